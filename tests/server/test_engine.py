"""The engine as the server has it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_spectral_server.engine import CUT_SHORT, END_SECONDS, Engine


def pretended(told: list[Any]) -> Engine:
    """An engine with two requests, without vLLM's inside; ``told`` gets the error and what is aborted."""

    async def abort(names: list[str]) -> None:
        told.append(names)

    states = {"a": None, "b": None}
    engine = Engine.__new__(Engine)
    engine.output_handler = asyncio.create_task(asyncio.sleep(60))
    engine.output_processor = SimpleNamespace(
        propagate_error=told.append, request_states=states, get_num_unfinished_requests=lambda: len(states)
    )
    engine.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=False), abort_requests_async=abort)
    return engine


def test_who_is_left_when_it_stops_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM leaves them waiting, and its server with them."""
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: None)
    told: list[Any] = []

    async def stop() -> None:
        engine = pretended(told)
        # Twice: the signal's own, in a thread as vLLM does it, and that of the block which started the engine.
        await asyncio.get_running_loop().run_in_executor(None, engine.shutdown, 0.1)
        engine.shutdown(0.1)
        assert engine.stopping
        with pytest.raises(GracefulHTTPError, match="told to stop"):
            engine.check_admission()

    asyncio.run(stop())
    error, aborted = told
    assert isinstance(error, GracefulHTTPError) and error.http_status == 503 and error.message == CUT_SHORT
    assert aborted == ["a", "b"]


@pytest.mark.parametrize("between_steps", [True, False])
def test_engines_are_told_to_stop_when_nothing_is_in_flight_any_more(
    monkeypatch: pytest.MonkeyPatch, between_steps: bool
) -> None:
    """A request that several steps serve, or whose prompt is on its way, is in flight though no engine knows it."""
    ended: list[float | None] = []
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: ended.append(timeout))

    async def stop() -> None:
        engine = pretended([])
        states = engine.output_processor.request_states
        if between_steps:
            states.clear()
            engine.working = 1
        stopping = asyncio.get_running_loop().run_in_executor(None, engine.shutdown, 60.0)
        await asyncio.sleep(0.2)
        assert not ended and not engine.over
        states.clear()
        engine.working = 0
        await asyncio.wait_for(stopping, 5)

    asyncio.run(stop())
    assert ended[0] == END_SECONDS, "and None when Python lets go of it"


def test_nothing_is_waited_for_when_the_engines_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: None)
    told: list[Any] = []

    async def stop() -> None:
        engine = pretended(told)
        engine.lost = lambda: True
        await asyncio.wait_for(asyncio.get_running_loop().run_in_executor(None, engine.shutdown, 60.0), 5)

    asyncio.run(stop())
    assert len(told) == 1, "there is no engine to abort anything"


def test_an_engine_that_never_started_ends_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python calls it when the half-made object goes, and would print what it raises below the cause."""
    monkeypatch.setattr(AsyncLLM, "shutdown", lambda self, timeout=None: None)
    Engine.__new__(Engine).shutdown()
