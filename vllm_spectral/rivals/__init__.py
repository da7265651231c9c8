"""What users would pick instead: torch references of other quantized KV caches, to be evaluated beside ours.

Each states its arithmetic from vLLM's own kernels, which run on GPUs only. They restore keys and values and do not pack
bytes: the bits they would take are computed from the layout of those kernels.
"""

from vllm_spectral.rivals.formats import RIVALS, Rival, rival

__all__ = ["RIVALS", "Rival", "rival"]
