"""The FastAPI application: vLLM's own OpenAI server, and what the KV cache costs."""
