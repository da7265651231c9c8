"""One file per route that vLLM does not have."""
