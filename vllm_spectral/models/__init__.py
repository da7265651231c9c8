"""What is known of a model from its files alone, before any engine starts."""
