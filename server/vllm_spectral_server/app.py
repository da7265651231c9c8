"""Assembly of the application: vLLM's routes, then ours."""

from __future__ import annotations

from argparse import Namespace

from fastapi import FastAPI

from vllm_spectral import __version__
from vllm_spectral_server.limits import MIDDLEWARE as GATE
from vllm_spectral_server.limits import Rules, hide_paths
from vllm_spectral_server.monitor import Monitor
from vllm_spectral_server.overload import MIDDLEWARE as OVERLOAD
from vllm_spectral_server.relay import MIDDLEWARE as FORWARD
from vllm_spectral_server.relay import Relay
from vllm_spectral_server.routes import dashboard, kv_cache, ready
from vllm_spectral_server.usage import MIDDLEWARE as USAGE


async def build_app(args: Namespace, watched: Monitor | Relay, rules: Rules) -> FastAPI:
    """VLLM's application with our routes and metrics added.

    Args:
        args: vLLM's serving arguments.
        watched: what knows the cache's state, started, or knows whom to ask.
        rules: what is taken from strangers.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app as build_vllm_app

    engine = watched.engine
    tasks = await engine.get_supported_tasks()
    # vLLM's application is complete when it is handed over: middleware has to be named before.
    forward = [FORWARD] if isinstance(watched, Relay) else []
    args.middleware = [*args.middleware, *forward, USAGE, OVERLOAD, GATE]
    app: FastAPI = build_vllm_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    app.title = "vllm-spectral"
    app.version = __version__
    app.state.spectral = watched
    app.state.rules = rules
    hide_paths(app)
    for part in (kv_cache, ready, dashboard):
        app.include_router(part.router)
    return app
