"""VLLM's engine, which brings what is in flight to its end, leaves nobody waiting, and always has room for the canary."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_spectral.backend.scheduler import CANARY_PREFIX

CUT_SHORT = (
    "The server was told to stop and had no time to finish this request. Please try again on a different instance."
)
END_SECONDS = 5.0
"""What engines get to end in when they have nothing left to do; vLLM kills them then."""
_LOOK_SECONDS = 0.05


class Engine(AsyncLLM):
    """VLLM's engine.

    Attributes:
        stopping: whether it takes no new requests; those in flight are brought to their end, as long as vLLM's
            ``--shutdown-timeout`` allows.
        over: whether that time is over, too: what is asked for now is refused with :data:`CUT_SHORT`.
        working: requests that HTTP has let in and that are being worked on. Those whose answer waits for its reader are not.
        lost: says whether engines that another process started have ended.
    """

    stopping = over = False
    working = 0
    lost: Callable[[], bool] = staticmethod(lambda: False)

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """As vLLM has it, but for the canary: a full queue must not look like a wrong answer.

        Raises:
            GracefulHTTPError: if the queue is full, or time is over.
        """
        if self.over:
            raise _cut_short()
        if request_id is None or not request_id.startswith(CANARY_PREFIX):
            super().check_admission(n, request_id)

    def shutdown(self, timeout: float | None = None) -> None:
        """As vLLM has it, but first what is in flight is brought to its end, and who is left then is told.

        VLLM has its engines do that, once they were told to stop. But an engine that was told answers whatever still
        comes with nothing, as if that were an answer: a prompt that was on its way, or the next of several steps that one
        request wants. It tells no one whose time is over either: they would wait for ever, and HTTP for them. And of several
        front ends none started the engines, so that none would wait.

        Blocks for as long: vLLM calls it in a thread.
        """
        first, self.stopping = not self.stopping, True
        loop = self._loop_of_another_thread() if first else None
        try:
            if loop is not None:
                deadline, timeout = time.monotonic() + (timeout or 0.0), END_SECONDS
                while self._in_flight() and not (self.errored or self.lost()) and time.monotonic() < deadline:
                    time.sleep(_LOOK_SECONDS)
                with contextlib.suppress(TimeoutError):
                    asyncio.run_coroutine_threadsafe(self._end(), loop).result(END_SECONDS)
        finally:
            super().shutdown(timeout)

    def _in_flight(self) -> int:
        return self.working + int(self.get_num_unfinished_requests())

    def _loop_of_another_thread(self) -> asyncio.AbstractEventLoop | None:
        """Where requests are handled; None if that is here, or nowhere: then there is nobody to wait for."""
        handler: Any = getattr(self, "output_handler", None)
        if handler is None:
            return None
        loop: asyncio.AbstractEventLoop = handler.get_loop()
        try:
            here = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        return None if loop is here or not loop.is_running() else loop

    async def _end(self) -> None:
        """Tell whoever is left; in one go, before the engines' end can reach them as an error of its own."""
        self.over = True
        left = list(self.output_processor.request_states)
        if self.output_handler is not None:
            self.output_handler.cancel()
        self.output_processor.propagate_error(_cut_short())
        if left and not (self.engine_core.resources.engine_dead or self.lost()):
            # Or it would go on working for them.
            await self.engine_core.abort_requests_async(left)


def _cut_short() -> GracefulHTTPError:
    return GracefulHTTPError(CUT_SHORT, HTTPStatus.SERVICE_UNAVAILABLE)
