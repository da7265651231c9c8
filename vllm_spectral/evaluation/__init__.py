"""The proof: how far answers from compressed pages are from exact ones."""
