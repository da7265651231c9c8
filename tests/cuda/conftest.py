"""The CUDA backend's own tests need a GPU, or vLLM's belief in one, which must be there before vLLM is imported."""

from __future__ import annotations

import torch

from tests.cuda.pretend import pretending

collect_ignore = [] if torch.cuda.is_available() or pretending() else ["device"]
