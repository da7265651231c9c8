"""The attention backend for stock vLLM. With :mod:`vllm_spectral.plugin`, the only code that imports vLLM."""
