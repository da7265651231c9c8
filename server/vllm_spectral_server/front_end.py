"""One process that serves HTTP: engine, monitor and application, brought up and down in order."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import AsyncIterator, Callable, MutableSequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_spectral.backend.scheduler import WATCHER, use_spectral_scheduler
from vllm_spectral.errors import ConfigError
from vllm_spectral.profile.schema import Profile
from vllm_spectral_server.app import build_app
from vllm_spectral_server.canary import Limits
from vllm_spectral_server.limits import PatientProtocol, Rules, Stackless
from vllm_spectral_server.metrics import Exporter
from vllm_spectral_server.monitor import Monitor
from vllm_spectral_server.relay import Relay, answering, relaying
from vllm_spectral_server.scheduler_view import COUNTS, SchedulerView

LINGER_SECONDS = 5
"""After the last answer was made, for clients to read it: one that does not is cut off."""


@dataclass(frozen=True)
class Watch:
    """How the server watches itself.

    Attributes:
        limits: past which figures raise alarms.
        canary_seconds: pause between two canaries; 0: none, and ``/ready`` says only that the engine runs; None: a minute, or
            longer on a slow machine.
    """

    limits: Limits = field(default_factory=Limits)
    canary_seconds: float | None = None


@dataclass(frozen=True)
class Settings:
    """What all front ends of a server are told.

    Attributes:
        name: what the user called the model.
        watch: how the server watches itself.
        rules: what it takes from strangers.
    """

    name: str
    watch: Watch
    rules: Rules


@dataclass(frozen=True)
class Seat:
    """A front end's place among those of its server; as given, the only one, which starts the engines itself.

    Attributes:
        index, count: which one, of how many.
        engines: vLLM's addresses of engines that run already; None: there are none.
        loads: vLLM's open connections of all front ends, and the index again; None: there are no others.
        socket: where the watching front end answers; None: there are no others.
        counts: see :class:`SchedulerView`; of all front ends.
        lost: says whether engines that run already have ended.
    """

    index: int = WATCHER
    count: int = 1
    engines: dict[str, Any] | None = None
    loads: tuple[MutableSequence[int], int] | None = None
    socket: Path | None = None
    counts: MutableSequence[int] = field(default_factory=lambda: [0] * len(COUNTS))
    lost: Callable[[], bool] = lambda: False


async def run(args: Namespace, sock: Any, settings: Settings, profile: Profile | None, seat: Seat) -> None:
    """Serve HTTP until a signal stops this process.

    Args:
        args: vLLM's serving arguments.
        sock: bound to the address.
        settings: of the server.
        profile: the active profile, None for the stock cache; needed where the watching is done.
        seat: of this process.

    Raises:
        SystemExit: if the engine has failed.
    """
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import serve_http
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    rules = settings.rules
    async with AsyncExitStack() as stack:
        engine, view = await stack.enter_async_context(_engine(args, seat))
        watched = await stack.enter_async_context(_watched(engine, view, settings, profile, seat))
        app = await build_app(args, watched, rules)
        log_config = get_uvicorn_log_config(args)
        if not rules.log_stacks:
            # From here on it is clients that make things fail.
            Stackless.install()
        shutdown = await serve_http(
            app,
            sock=sock,
            enable_ssl_refresh=args.enable_ssl_refresh,
            peer_loads=seat.loads,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            access_log=not args.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            timeout_graceful_shutdown=LINGER_SECONDS,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            ssl_ciphers=args.ssl_ciphers,
            http=PatientProtocol,
            h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
            h11_max_header_count=args.h11_max_header_count,
            **({"log_config": log_config} if log_config is not None else {}),
        )
        failed = engine.errored and not engine.stopping
    try:
        await shutdown
    finally:
        sock.close()
    if failed:
        # A supervisor that restarts on failure must see one.
        raise SystemExit("the engine has failed: see the log above for the cause")


@asynccontextmanager
async def _watched(
    engine: Any, view: SchedulerView, settings: Settings, profile: Profile | None, seat: Seat
) -> AsyncIterator[Monitor | Relay]:
    """What knows the cache's state, or knows whom to ask; until the end of the block."""
    async with AsyncExitStack() as stack:
        if seat.index == WATCHER:
            monitor = Monitor(
                engine, view, settings.name, profile, settings.watch.limits, settings.watch.canary_seconds
            )
            await monitor.start()
            Exporter(monitor, engine.model_config.served_model_name)
            await stack.enter_async_context(monitor.running())
            if seat.socket is None:
                yield monitor
                return
            await stack.enter_async_context(answering(monitor, seat.socket))
        assert seat.socket is not None
        # The process that watches asks itself, too: there is one way to answer, whichever a client meets.
        yield await stack.enter_async_context(relaying(engine, seat.socket))


def engine_arguments(args: Namespace, count: int = 1, index: int = WATCHER) -> Any:
    """VLLM's ``AsyncEngineArgs``.

    Args:
        args: vLLM's serving arguments.
        count: front ends of the server.
        index: which of them asks; -1: none, but who starts the engines for them.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = AsyncEngineArgs.from_cli_args(args)
    if count > 1:
        arguments._api_process_count, arguments._api_process_rank = count, index
    return arguments


def engine_config(arguments: Any) -> Any:
    """VLLM's configuration from its ``AsyncEngineArgs``.

    Raises:
        ConfigError: if vLLM refuses the flags, in its words.
    """
    from vllm.usage.usage_lib import UsageContext

    try:
        return arguments.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except ValidationError as error:
        told = [str(each["msg"]).removeprefix("Value error, ") for each in error.errors()]
        raise ConfigError(f"vLLM refuses these flags: {'; '.join(told)}") from None


@asynccontextmanager
async def _engine(args: Namespace, seat: Seat) -> AsyncIterator[tuple[Any, SchedulerView]]:
    """VLLM's engine with our view of the scheduler's statistics attached."""
    from vllm.usage.usage_lib import UsageContext

    from vllm_spectral_server.engine import Engine

    arguments = engine_arguments(args, seat.count, seat.index)
    vllm_config = engine_config(arguments)
    use_spectral_scheduler(vllm_config)
    view = SchedulerView(counts=seat.counts, front_end=seat.index)
    engine = Engine.from_vllm_config(
        vllm_config=vllm_config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=arguments.enable_log_requests,
        aggregate_engine_logging=arguments.aggregate_engine_logging,
        disable_log_stats=arguments.disable_log_stats,
        stat_loggers=[view.logger],
        client_addresses=seat.engines,
        client_count=seat.count,
        client_index=seat.index,
    )
    engine.lost = seat.lost
    try:
        yield engine, view
    finally:
        engine.shutdown(timeout=vllm_config.shutdown_timeout)
