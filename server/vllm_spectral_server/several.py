"""Several processes that serve HTTP, in front of the same engines: vLLM's ``--api-server-count``.

VLLM starts them, balances connections between them, and counts unfinished requests over all of them. This process starts
everything, waits, and takes everything down when any part has ended.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from argparse import Namespace
from collections.abc import MutableSequence
from functools import partial
from pathlib import Path
from typing import Any

from vllm_spectral.backend.scheduler import WATCHER, use_spectral_scheduler
from vllm_spectral.config import parse_config
from vllm_spectral_server.front_end import LINGER_SECONDS, Seat, Settings, engine_arguments, engine_config, run
from vllm_spectral_server.scheduler_view import COUNTS

GRACE_SECONDS = 5.0 + LINGER_SECONDS
"""What a front end gets to end in, after the requests in flight had their time."""


def serve_several(args: Namespace, settings: Settings) -> None:
    """Serve with ``args.api_server_count`` processes until a signal stops us.

    Raises:
        SystemExit: with 0 when told to stop, with a message when a part has failed.
        ConfigError: if vLLM refuses the flags.
    """
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
    from vllm.v1.executor import Executor
    from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
    from vllm.v1.utils import APIServerProcessManager, wait_for_completion_or_failure

    count: int = args.api_server_count
    setup_multiprocess_prometheus()
    # All of them accept from this one socket: no other server can join it by mistake.
    address, sock = setup_server(args, reuse_port=False)
    config = engine_config(engine_arguments(args, count, -1))
    use_spectral_scheduler(config)
    stopped = _on_signals()
    front_ends = launched = None
    # Beside vLLM's own sockets; only this user may enter.
    with tempfile.TemporaryDirectory(prefix="vllm-spectral-", dir=envs.VLLM_RPC_BASE_PATH) as folder:
        try:
            listeners = bind_engine_zmq_listeners(config, count)
            starting = launch_core_engines(config, Executor.get_class(config), True, listeners.addresses)
            with starting as launched:
                coordinator = launched.coordinator
                spawn = multiprocessing.get_context("spawn")
                counts: Any = spawn.RawArray("q", count * len(COUNTS))
                lost: Any = spawn.RawValue("b", 0)
                front_ends = APIServerProcessManager(
                    listen_address=address,
                    sock=sock,
                    args=args,
                    num_servers=count,
                    input_listeners=listeners.inputs,
                    output_listeners=listeners.outputs,
                    target_server_fn=partial(
                        _front_end, settings=settings, socket=Path(folder) / "watcher", counts=counts, lost=lost
                    ),
                    stats_update_address=coordinator.get_stats_publish_address() if coordinator else None,
                    tensor_queue=launched.tensor_queue,
                )
                launched.watched_frontend_processes = front_ends.processes
            wait_for_completion_or_failure(front_ends, launched.engine_manager, coordinator)
        except RuntimeError as error:
            raise SystemExit(f"the server has failed: {error}: see the log above for the cause") from None
        finally:
            # The requests in flight first, then what answers them; without engines there is nothing to wait for.
            parts = (launched.engine_manager, launched.coordinator) if launched is not None else (None, None)
            if front_ends is not None:
                lost.value = not stopped and _any_ended(*parts)
                front_ends.shutdown(timeout=GRACE_SECONDS + (0 if lost.value else config.shutdown_timeout))
            for part in parts:
                if part is not None:
                    part.shutdown()
            sock.close()


def _any_ended(engines: Any, coordinator: Any) -> bool:
    """Whether an engine's process has, or the coordinator's."""
    processes = [*(engines.processes if engines else ()), *([coordinator.proc] if coordinator else ())]
    return not all(process.is_alive() for process in processes)


def _on_signals() -> list[int]:
    """Have SIGTERM and SIGINT raise SystemExit, once; the list then holds which it was."""
    received: list[int] = []

    def stop(number: int, _frame: Any) -> None:
        if not received:
            received.append(number)
            raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return received


def _front_end(
    _address: str,
    sock: Any,
    args: Namespace,
    client: dict[str, Any],
    *,
    settings: Settings,
    socket: Path,
    counts: MutableSequence[int],
    lost: Any,
) -> None:
    """One of the processes, in the form that vLLM starts them.

    Raises:
        SystemExit: with 1, always: whoever still waits for this process did not ask it to end.
    """
    import uvloop
    from vllm.logger import configure_logging_from_args
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager
    from vllm.utils.system_utils import decorate_logs, set_process_title

    from vllm_spectral.backend.impl import load_once
    from vllm_spectral.backend.orphan import end_with_parent

    index: int = client.pop("client_index")
    set_process_title("APIServer", str(index))
    decorate_logs()
    configure_logging_from_args(args)
    end_with_parent()
    for plugin, load in (
        (args.tool_parser_plugin, ToolParserManager.import_tool_parser),
        (args.reasoning_parser_plugin, ReasoningParserManager.import_reasoning_parser),
    ):
        if plugin:
            load(plugin)
    active = parse_config(args.additional_config, os.environ)
    profile = load_once(active, args.model) if active and index == WATCHER else None
    loads = client.pop("api_server_loads")
    seat = Seat(index, client.pop("client_count"), client, (loads, index), socket, counts, lambda: bool(lost.value))
    uvloop.run(run(args, sock, settings, profile, seat))
    raise SystemExit(1)
