"""Have vLLM believe that it runs on a Hopper GPU, where there is none.

VLLM's Python files are the same in all builds. What is faked is what they ask of the machine: the driver, and the compiled
extensions, which are empty. So configurations, classes and metadata are vLLM's own; nothing of it computes.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType

from tests.engine.runner import pretend_triton

PRETEND = "TEST_PRETEND_CUDA"
_EXTENSIONS = (
    "vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip


def pretending() -> bool:
    """Whether this process was asked to."""
    return os.environ.get(PRETEND) == "1"


def pretend_cuda() -> None:
    """Must run before anything asks vLLM for its platform."""
    pretend_triton()
    import vllm.platforms

    sys.modules.update({name: ModuleType(name) for name in _EXTENSIONS})
    from vllm.platforms.cuda import CudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Hopper(CudaPlatform):
        """An H100 whose memory is the host's: tensors of its layers are the CPU's."""

        device_type = "cpu"
        capability = DeviceCapability(9, 0)

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return cls.capability

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "no H100"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 80 << 30

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

    vllm.platforms.current_platform = Hopper()  # type: ignore[misc]
    from vllm import _custom_ops

    for name in dir(_custom_ops):
        if name.startswith("cutlass") and "support" in name:
            setattr(_custom_ops, name, lambda *_: False)
