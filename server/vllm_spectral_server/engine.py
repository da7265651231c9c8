"""VLLM's engine, which says when it was told to stop, leaves nobody waiting then, and always has room for the canary."""

from __future__ import annotations

import time
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_spectral.backend.scheduler import CANARY_PREFIX

CUT_SHORT = (
    "The server was told to stop and had no time to finish this request. Please try again on a different instance."
)
_LOOK_SECONDS = 0.05


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
        """As vLLM has it; beside other front ends also what is in flight is brought to its end.

        Blocks for as long: vLLM calls it in a thread. It drains the engines that it started itself, and where there are
        several front ends none of them did. Nor does it tell those whose time is over: they would wait for ever, and HTTP
        for them.
        """
        first, self.stopping = not self.stopping, True
        if first and getattr(self, "_client_count", 1) > 1:
            deadline = time.monotonic() + (timeout or 0.0)
            while self.get_num_unfinished_requests() and not self.errored and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
        super().shutdown(timeout)
        if first and self.output_handler is not None:
            error = GracefulHTTPError(CUT_SHORT, HTTPStatus.SERVICE_UNAVAILABLE)
            self.output_handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, error)
