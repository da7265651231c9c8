"""VLLM's engine, which says when it was told to stop, and always has room for the canary."""

from __future__ import annotations

from vllm.v1.engine.async_llm import AsyncLLM

from vllm_spectral.backend.scheduler import CANARY_PREFIX


class Engine(AsyncLLM):
    """VLLM's engine.

    Attributes:
        stopping: whether it takes no new requests; those in flight are brought to their end, as long as vLLM's
            ``--shutdown-timeout`` allows.
    """

    stopping = False

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """As vLLM has it, but for the canary: a full queue must not look like a wrong answer."""
        if request_id is None or not request_id.startswith(CANARY_PREFIX):
            super().check_admission(n, request_id)

    def shutdown(self, timeout: float | None = None) -> None:
        """As vLLM has it."""
        self.stopping = True
        super().shutdown(timeout)
