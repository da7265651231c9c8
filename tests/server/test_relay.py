"""One process watches, and any of them answers."""

from __future__ import annotations

import asyncio
import multiprocessing
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from vllm_spectral_server.canary import Limits
from vllm_spectral_server.monitor import Monitor
from vllm_spectral_server.relay import SILENT, WATCHED, Forward, answering, relaying
from vllm_spectral_server.scheduler_view import COUNTS, SchedulerView

from vllm_spectral.stats.memory import LayerMemory, WorkerMemory


def counting() -> Any:
    """Of two front ends, in the memory that they share."""
    return multiprocessing.get_context("spawn").RawArray("q", 2 * len(COUNTS))


def step(prompt: int, generated: int) -> Any:
    return SimpleNamespace(
        prompt_token_stats=SimpleNamespace(computed=prompt), num_generation_tokens=generated, num_preempted_reqs=1
    )


def pretended_monitor(view: SchedulerView) -> Monitor:
    """A real one, without an engine."""
    config = SimpleNamespace(cache_config=SimpleNamespace(block_size=32))
    view.logger(config)
    monitor = Monitor(
        SimpleNamespace(vllm_config=config, stopping=False, errored=False), view, "demo", None, Limits(), 0.0
    )
    monitor.canary.state, monitor.canary.message = "off", "the stock cache is served"
    layers = tuple(LayerMemory(f"layer{i}", 48, 2, 64, 3.0, 3.0, True, 48 * 2 * 32 * 10, 7, 5, 11) for i in range(3))
    monitor._workers = [[WorkerMemory(layers, 10, 48 * 2 * 32 * 30, 13)]]
    return monitor


def application(relay: Any, scrapes: list[int]) -> FastAPI:
    app = FastAPI()
    app.state.spectral = relay
    app.add_middleware(Forward)

    @app.get("/metrics")
    def metrics() -> int:
        return len(scrapes)

    return app


def test_every_path_of_the_watcher_is_known() -> None:
    figures = {f"/v1/kv_cache/{name}" for name in ("memory", "fidelity", "profile", "moments", "traffic")}
    assert {"/ready"} | figures == WATCHED


def test_what_one_process_knows_all_answer(tmp_path: Path) -> None:
    async def check() -> None:
        monitor, scrapes = pretended_monitor(SchedulerView()), list[int]()
        monitor.on_scrape = lambda: scrapes.append(1)
        async with answering(monitor, tmp_path / "watcher"), relaying(monitor.engine, tmp_path / "watcher") as relay:
            transport = ASGITransport(application(relay, scrapes))
            async with AsyncClient(transport=transport, base_url="http://any") as client:
                memory = (await client.get("/v1/kv_cache/memory")).json()
                assert memory["pool_bytes"] == monitor.memory.pool_bytes > 0
                monitor.view.engines[0].blocks = (3, 2)
                assert (await client.get("/v1/kv_cache/memory")).json()["used_bytes"] == monitor.memory.used_bytes > 0
                assert relay.held(33) == monitor.held(33)
                assert (await client.get("/v1/kv_cache/profile")).status_code == 404
                assert (await client.get("/ready")).status_code == 200
                monitor.engine.stopping = True
                refused = await client.get("/ready")
                assert (refused.status_code, refused.json()["reason"]) == (503, "the server is stopping")
                assert (await client.get("/metrics")).json() == 1, "asked for before it was read"
                assert (await client.get("/v1/kv_cache/nothing")).status_code == 404
                assert (await client.post("/ready")).status_code == 404, "only what is read is asked for"

    asyncio.run(check())


def test_a_watcher_that_is_gone_is_missed(tmp_path: Path) -> None:
    async def check() -> None:
        monitor = pretended_monitor(SchedulerView())
        async with AsyncExitStack() as stack:
            watcher = answering(monitor, tmp_path / "watcher")
            await watcher.__aenter__()
            relay = await stack.enter_async_context(relaying(monitor.engine, tmp_path / "watcher"))
            transport = ASGITransport(application(relay, []))
            client = await stack.enter_async_context(AsyncClient(transport=transport, base_url="http://any"))
            assert (await client.get("/ready")).status_code == 200
            await watcher.__aexit__(None, None, None)
            for path in (*WATCHED, "/metrics"):
                answer = await client.get(path)
                assert (answer.status_code, answer.json()["error"]["message"]) == (503, SILENT)

    asyncio.run(check())


def test_nobody_is_let_in_before_the_watcher_answers_and_an_engine_that_died_is_not_waited_for(tmp_path: Path) -> None:
    async def check() -> None:
        engine = SimpleNamespace(errored=True)
        with pytest.raises(RuntimeError, match="the engine has failed"):
            async with relaying(engine, tmp_path / "watcher"):
                pass

    asyncio.run(check())


def test_tokens_are_counted_over_all_front_ends() -> None:
    counts = counting()
    first, second = (SchedulerView(counts=counts, front_end=index) for index in (0, 1))
    for view in (first, second):
        view.logger(None)
    first.record(0, None, step(10, 1))
    second.record(0, None, step(1000, 100))
    second.record(0, None, step(0, 7))
    for view in (first, second):
        assert [view.total(name) for name in COUNTS] == [1010, 108, 3]
        assert view.tokens_per_second() == pytest.approx((101.0, 10.8))
