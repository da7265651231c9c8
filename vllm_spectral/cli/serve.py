"""``vllm-spectral serve``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_spectral.cli.common import (
    MODEL_HELP,
    add_exact,
    add_exempt,
    count,
    described,
    exact_fields,
    exempt_layers,
    for_workers,
    load_for,
    number,
    size,
    warn,
)
from vllm_spectral.config import DISABLE_VARIABLE, SpectralConfig
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.versions import require_tested_vllm

_DESCRIPTION = f"""\
Serve a model through the OpenAI API from compressed KV pages.

All other flags are vLLM's own and are passed through: --host, --port, --api-key, --max-model-len,
--kv-cache-memory-bytes (of each rank), --tensor-parallel-size, --data-parallel-size, --api-server-count (processes that
serve HTTP; 1 unless given), ... (see `vllm serve --help=all`).
Beside vLLM's routes there are GET /v1/kv_cache/memory, fidelity, profile and traffic, GET /ready and the page
/dashboard. Where a flag is not given, these differ from vLLM's defaults: the model is served under the name MODEL
(--served-model-name), 1024 requests wait or run at most (--max-num-queued-reqs), a server told to stop has 30 s for what it
began (--shutdown-timeout), a request is let in beside others while 0.05 of the pages stay free for their answers to grow
(--watermark), and headers may have 65536 bytes (--h11-max-incomplete-event-size); on the CPU also --enforce-eager (vLLM
0.32 gives wrong text when it compiles for the CPU), --block-size 32, steps of 256 tokens (--max-num-batched-tokens, so that
who decodes need not wait for others' prompts; not with --performance-mode throughput, --enable-lora or
--no-enable-chunked-prefill), and --dtype float32 if the CPU has no bf16 arithmetic.
{DISABLE_VARIABLE}=1 serves the same model with the stock cache.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI server on compressed KV pages",
        usage="vllm-spectral serve MODEL --profile PROFILE [our flags below] [vLLM serving flags]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        # vLLM has many flags; guessing from prefixes would take some of them for ours.
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--profile", metavar="PROFILE", type=Path, required=True, help="made by `calibrate`")
    add_exempt(parser)
    add_exact(parser)
    watch = parser.add_argument_group(
        "watching", "what the server finds out about its own answers; see GET /ready, /dashboard and docs/metrics.md"
    )
    watch.add_argument(
        "--fidelity-every", metavar="STEPS", type=count, default=SpectralConfig().fidelity_every,
        help="sample one step in so many, about (%(default)s); 0: none",
    )  # fmt: skip
    watch.add_argument(
        "--canary-seconds", metavar="SECONDS", type=number, default=None,
        help="pause between two runs of a fixed prompt whose exact answer is known (60, or longer where that would take more "
        "than 0.3 %% of the time); 0: none, and /ready says no more than that the engine runs",
    )  # fmt: skip
    watch.add_argument(
        "--canary-kl", metavar="NATS", type=number, default=0.25,
        help="divergence of the canary's predictions from which /ready answers 503 (%(default)g)",
    )  # fmt: skip
    watch.add_argument(
        "--error-limit", metavar="RATIO", type=number, default=1.5,
        help="stored error of live traffic in a layer, over what the profile predicts, from which an alarm is raised "
        "(%(default)g). For the canary a profile has figures of its own; one made without a model (instant, from traffic) "
        "has none, and then /ready goes by this one",
    )  # fmt: skip
    watch.add_argument(
        "--drift-limit", metavar="SHARE", type=number, default=0.08,
        help="share of live traffic's energy outside the profile's leading channels, likewise (%(default)g)",
    )  # fmt: skip
    access = parser.add_argument_group(
        "access", "what the server takes from strangers; see docs/security.md. Once there is an --api-key, it is asked for\n"
        "everywhere but where probes, scrapers and browsers read: /health, /ping, /ready, /metrics, /version, /load,\n"
        "/docs, /openapi.json and /dashboard"
    )  # fmt: skip
    access.add_argument(
        "--protect-all", action="store_true",
        help="ask for the key there as well, but at /health and /ping; as the password of any user, for browsers, or as a "
        "bearer token",
    )  # fmt: skip
    access.add_argument(
        "--max-body-size", metavar="SIZE", type=size, default=None,
        help="largest body of a request; 64M, 1.5G, ... (32M). Larger ones are answered 413",
    )  # fmt: skip
    gpu = parser.add_argument_group("NVIDIA GPUs")
    gpu.add_argument(
        "--experimental-cuda", action="store_true",
        help="serve on a GPU, where this was not yet run: answers may be wrong, speed is unknown; refused without",
    )  # fmt: skip
    parser.set_defaults(run=run, passes_flags_on=True)


def _warn_of_key_biases(model: ModelDescription, exempt: frozenset[int]) -> None:
    """Recommend layers, and leave the choice to the user: a layer on stock pages costs capacity."""
    from vllm_spectral.models.biases import survey

    missing = [layer for layer in survey(model).exempt_layers if layer not in exempt]
    if missing:
        names = " ".join(map(str, missing))
        warn(
            f"key biases of layers {names} are too large to be compressed well; consider --exempt-layers {names} "
            "(`vllm-spectral doctor MODEL` says more)"
        )


def run(args: argparse.Namespace) -> int:
    """Check everything, then hand over to the server."""
    require_tested_vllm()
    model = described(args.model)
    model.require_supported()
    path = for_workers(args.profile)
    profile = load_for(model, path)
    exempt = exempt_layers(args, model)
    _warn_of_key_biases(model, exempt)
    config = SpectralConfig(
        path, profile.digest, exempt, fidelity_every=args.fidelity_every, allow_unproven_device=args.experimental_cuda,
        **exact_fields(args),
    )  # fmt: skip
    from vllm_spectral_server.canary import Limits
    from vllm_spectral_server.front_end import Watch
    from vllm_spectral_server.launch import serve
    from vllm_spectral_server.limits import MAX_BODY_BYTES, RequestLimits

    watch = Watch(Limits(args.error_limit, args.drift_limit, args.canary_kl), args.canary_seconds)
    limits = RequestLimits(MAX_BODY_BYTES if args.max_body_size is None else args.max_body_size, args.protect_all)
    serve(model, args.model, profile, config, watch, limits, args.rest)
    return 0
