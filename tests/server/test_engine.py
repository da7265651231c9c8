"""The engine as the server has it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_spectral_server.engine import CUT_SHORT, Engine


def test_who_is_left_when_it_stops_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM leaves them waiting, and its server with them."""
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: None)
    told: list[Any] = []

    async def stop() -> None:
        engine = Engine.__new__(Engine)
        engine.output_handler = asyncio.create_task(asyncio.sleep(0))
        engine.output_processor = SimpleNamespace(propagate_error=told.append)
        # Twice: the signal's own, in a thread as vLLM does it, and that of the block which started the engine.
        await asyncio.get_running_loop().run_in_executor(None, engine.shutdown, 0.1)
        engine.shutdown(0.1)
        await asyncio.sleep(0.01)
        assert engine.stopping

    asyncio.run(stop())
    (error,) = told
    assert isinstance(error, GracefulHTTPError) and error.http_status == 503 and error.message == CUT_SHORT
