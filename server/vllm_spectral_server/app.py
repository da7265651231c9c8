"""Assembly of the application: vLLM's routes, then ours."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from vllm_spectral import __version__
from vllm_spectral.profile.schema import Profile
from vllm_spectral_server.routes import kv_cache
from vllm_spectral_server.usage import PoolUsage


async def build_app(args: Namespace, engine: Any, usage: PoolUsage, name: str, profile: Profile | None) -> FastAPI:
    """VLLM's application with our routes added.

    Args:
        args: vLLM's serving arguments.
        engine: the running engine.
        usage: the scheduler's view of the pool.
        name: what the user called the model.
        profile: the active profile, or None if the stock cache is served.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app as build_vllm_app

    tasks = await engine.get_supported_tasks()
    app: FastAPI = build_vllm_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    app.title = "vllm-spectral"
    app.version = __version__
    app.state.spectral = kv_cache.CacheSource(engine, usage, name, profile)
    app.include_router(kv_cache.router)
    return app
