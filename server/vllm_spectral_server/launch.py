"""Start-up: from checked arguments to a running server."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from vllm_spectral.backend.engine import BLOCK_SIZE, cpu_dtype
from vllm_spectral.backend.worker import EXTENSION
from vllm_spectral.config import CONFIG_KEY, UNPROVEN, SpectralConfig, parse_config
from vllm_spectral.errors import ConfigError
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.schema import Profile
from vllm_spectral_server.front_end import Seat, Settings, Watch, run
from vllm_spectral_server.limits import MAX_HEADER_BYTES, RequestLimits, Rules
from vllm_spectral_server.several import serve_several

logger = init_logger("vllm.spectral.launch")

MOST_REQUESTS = 1024
"""Unfinished requests from which on new ones are answered 503; vLLM's own default is any number."""
DRAIN_SECONDS = 30
"""What requests in flight are given when the server is told to stop; vLLM's own default is nothing."""
ROOM_TO_GROW = 0.05
"""Part of the pages that must stay free when a request is let in beside others, for their answers to grow; vLLM's own default
is nothing. Where many requests fit, one of them soon wants a page when none is free; what is preempted is prefilled twice."""
STEP_TOKENS = 256
"""Tokens of a step; vLLM's own default on the CPU is 2048 and more. Where the pages have room for many long prompts, who
decodes beside them gets one token a step, and a CPU takes seconds for thousands of tokens of prompts."""
KEPT_PRODUCTS = 256
"""Compiled matrix products that oneDNN keeps for all weights together; its own default is 1024. vLLM keeps those of the last
32 numbers of tokens for each weight besides, which a transformer's five shapes of weights share: 160."""
NUMA_NODES = Path("/sys/devices/system/node")
_ONE_MACHINE = "a server has all its ranks on one machine; start one on each machine, behind a load balancer"
REFUSED = {
    "--pipeline-parallel-size": "not supported: use --tensor-parallel-size",
    "--headless --data-parallel-external-lb --data-parallel-hybrid-lb --data-parallel-multi-port-external-lb "
    "--data-parallel-rank --data-parallel-start-rank --nnodes": _ONE_MACHINE,
    "--grpc --grpc-port": "only HTTP is served: leave it out",
    "--disable-log-stats": "it would hide from us what is in use: leave it out",
    "--scheduler-cls --worker-extension-cls": "taken by vllm-spectral",
    "--kv-transfer-config --kv-offloading-size": "pages mean something only with their profile, which no connector compares",
    "--enable-sleep-mode": "vLLM throws pages away while it sleeps, and knows nothing of the exact copies: leave it out",
    "--revision": "a model of the hub is served as its main branch has it; for another, download it and name its directory",
}
"""Serving flags of vLLM, and why they are refused."""
_ONE_IS_FINE = {"--pipeline-parallel-size", "--nnodes"}


def serve(
    model: ModelDescription,
    name: str,
    profile: Profile,
    config: SpectralConfig,
    watch: Watch,
    limits: RequestLimits,
    flags: Sequence[str],
) -> None:
    """Serve until a signal stops us.

    Args:
        model: the model, checked.
        name: what the user called it; the name it is served under unless the flags say otherwise.
        profile: its profile, verified.
        config: our backend's configuration.
        watch: how it watches itself.
        limits: what it takes from strangers.
        flags: vLLM's serving flags.

    Raises:
        ConfigError: if the flags contradict us.
    """
    from vllm import envs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    require_device(config)
    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm-spectral serve MODEL --profile PROFILE"))
    args = parser.parse_args(["--model", str(model.path), *default_flags(flags, name), *flags])
    if args.model_tag is not None or args.model != str(model.path):
        raise ConfigError(
            f"one MODEL is served at a time, and it is named first: {args.model_tag or args.model} is extra"
        )
    refuse(args)
    args.max_num_batched_tokens = step_tokens(args)
    if shares_cores(args):
        logger.warning(
            "by default vLLM binds every data-parallel engine to a memory node of its own, and where there are fewer nodes, "
            "several to the same cores: name the cores of each rank, VLLM_CPU_OMP_THREADS_BIND='0-7|8-15'"
        )
    args.additional_config = merge_config(args.additional_config, config)
    args.worker_extension_cls = EXTENSION
    set_environment(args)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    # As vLLM reads them.
    keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    rules = Rules.of(limits, keys, args.log_error_stack)
    _run(args, Settings(name, watch, rules), profile)


def set_environment(args: Namespace) -> None:
    """What the processes of the engine read when they start, and vLLM has no flag for; what the user has set stays."""
    if args.enforce_eager:
        # Even then vLLM compiles a few functions when they are first used, log-probabilities among them, and where there is
        # no compiler the first canary would end the engine.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # A product is compiled for every number of tokens that a step happens to have, and 1024 of them fill up hundreds of
    # megabytes over hours. What a GPU runs does not ask for it.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_PRODUCTS))


def require_device(config: SpectralConfig) -> None:
    """Refuse what this was not made for, and a GPU unless it was asked for.

    Raises:
        ConfigError: the platform, and the way out.
    """
    from vllm.platforms import current_platform

    asked = config.allow_unproven_device
    if current_platform.is_cpu():
        if asked:
            raise ConfigError(
                "--experimental-cuda: this vLLM runs on the CPU (vllm-cpu): leave it out, or install vllm"
            )
    elif not current_platform.is_cuda():
        raise ConfigError(f"this vLLM runs on {current_platform.device_type}: served are the CPU (vllm-cpu) and CUDA")
    elif not asked:
        raise ConfigError(f"{UNPROVEN}. To try all the same: --experimental-cuda; else use vllm-cpu; see docs/gpu.md")
    else:
        logger.warning("--experimental-cuda: %s", UNPROVEN)


def refuse(args: Namespace) -> None:
    """Refuse what vLLM could do and this server cannot, rather than ignore it.

    Raises:
        ConfigError: the flag, the reason and the way out.
    """
    from vllm.platforms import current_platform

    for flags, reason in REFUSED.items():
        for flag in flags.split():
            value = getattr(args, flag.removeprefix("--").replace("-", "_"), None)
            # Rank 0 is a value like any other.
            given = value is not None and value is not False and value != ""
            if given and not (flag in _ONE_IS_FINE and value == 1):
                raise ConfigError(f"{flag}: {reason}")
    backend = str(getattr(args.attention_backend, "name", args.attention_backend))
    if current_platform.is_cuda() and backend != "CUSTOM":
        raise ConfigError(f"--attention-backend {backend}: it would serve vLLM's own cache; leave it out")
    count = args.api_server_count
    if count is not None and count < 1:
        raise ConfigError(f"--api-server-count {count}: somebody has to serve HTTP: leave it out for one process")
    if count is not None and count > 1:
        _refuse_beside_others(args)
    size, local = args.data_parallel_size, args.data_parallel_size_local
    if local not in (None, size):
        raise ConfigError(f"--data-parallel-size-local {local} of {size}: {_ONE_MACHINE}")


def _refuse_beside_others(args: Namespace) -> None:
    """Refuse what one of several front ends would do, and the others not know of."""
    from vllm import envs

    if envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise ConfigError(
            "--api-server-count: adapters are loaded by one process, and the others would not know: "
            "leave it out, or unset VLLM_ALLOW_RUNTIME_LORA_UPDATING"
        )
    if args.enable_elastic_ep:
        raise ConfigError("--enable-elastic-ep: vLLM has it with one process for HTTP: leave --api-server-count out")


def shares_cores(args: Namespace) -> bool:
    """Whether vLLM is about to run several data-parallel engines on the same cores of this machine, and says nothing."""
    from vllm import envs
    from vllm.platforms import current_platform

    nodes = len(list(NUMA_NODES.glob("node[0-9]*")))
    automatic = envs.VLLM_CPU_OMP_THREADS_BIND == "auto" and not int(os.environ.get("VLLM_CPU_SIM_MULTI_NUMA", "0"))
    ranks = args.data_parallel_size * args.tensor_parallel_size
    return current_platform.is_cpu() and automatic and args.data_parallel_size > 1 and ranks > nodes


def default_flags(flags: Sequence[str], name: str) -> list[str]:
    """Flags that are ours unless the user gave them; see the help of ``vllm-spectral serve``."""
    from vllm.platforms import current_platform

    wanted = {
        "--served-model-name": [name],
        "--max-num-queued-reqs": [str(MOST_REQUESTS)],
        "--shutdown-timeout": [str(DRAIN_SECONDS)],
        "--watermark": [str(ROOM_TO_GROW)],
        "--h11-max-incomplete-event-size": [str(MAX_HEADER_BYTES)],
    }
    if current_platform.is_cpu():
        wanted |= {"--enforce-eager": [], "--block-size": [str(BLOCK_SIZE)], "--dtype": [cpu_dtype()]}
    elif current_platform.is_cuda():
        # VLLM's name for a backend that is not its own.
        wanted |= {"--attention-backend": ["CUSTOM"]}
    given = {flag.split("=")[0].replace("_", "-") for flag in flags if flag.startswith("--")}
    given |= {flag.replace("--no-", "--") for flag in given}
    return [part for flag, value in wanted.items() if flag not in given for part in (flag, *value)]


def step_tokens(args: Namespace) -> int | None:
    """How many tokens a step has at most; None: vLLM's default, on a GPU, or where a flag wants long steps."""
    from vllm.platforms import current_platform

    more = args.enable_chunked_prefill is False or args.performance_mode == "throughput" or args.enable_lora
    if args.max_num_batched_tokens is not None or more or not current_platform.is_cpu():
        return args.max_num_batched_tokens  # type: ignore[no-any-return]
    return max(STEP_TOKENS, args.max_num_seqs or 0)


def merge_config(additional: Any, config: SpectralConfig) -> dict[str, Any]:
    """The user's ``--additional-config`` with our part added."""
    given = json.loads(additional) if isinstance(additional, str) else dict(additional or {})
    if CONFIG_KEY in given:
        raise ConfigError(f'--additional-config must not hold "{CONFIG_KEY}": use the flags of vllm-spectral serve')
    return given | config.to_additional_config()


def _run(args: Namespace, settings: Settings, profile: Profile) -> None:
    import uvloop
    from vllm.entrypoints.launchers.launcher import setup_server

    if (args.api_server_count or 1) > 1:
        serve_several(args, settings)
        return
    _, sock = setup_server(args, reuse_port=False)
    active = profile if parse_config(args.additional_config, os.environ) else None
    uvloop.run(run(args, sock, settings, active, Seat()))
