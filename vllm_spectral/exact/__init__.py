"""The exact tier: uncompressed copies of each request's first and most recent tokens, in a pool of fixed size."""

from vllm_spectral.exact.directory import ExactDirectory, StepPlan
from vllm_spectral.exact.window import ExactWindow

__all__ = ["ExactDirectory", "ExactWindow", "StepPlan"]
