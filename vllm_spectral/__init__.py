"""vllm-spectral: spectrally rotated, quantized KV pages for stock vLLM."""

__version__ = "0.1.0"
