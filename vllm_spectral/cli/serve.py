"""``vllm-spectral serve``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_spectral.cli.common import (
    MODEL_HELP,
    add_exact,
    add_exempt,
    described,
    exact_fields,
    exempt_layers,
    for_workers,
    load_for,
    warn,
)
from vllm_spectral.config import DISABLE_VARIABLE, SpectralConfig
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.versions import require_tested_vllm

_DESCRIPTION = f"""\
Serve a model through the OpenAI API from compressed KV pages.

All other flags are vLLM's own and are passed through: --host, --port, --api-key, --max-model-len,
--kv-cache-memory-bytes, --tensor-parallel-size, ... (see `vllm serve --help=all`). Beside vLLM's routes there is
GET /v1/kv_cache/memory. Where a flag is not given, these differ from vLLM's defaults: the model is served under the
name MODEL; on the CPU also --enforce-eager (vLLM 0.32 gives wrong text when it compiles for the CPU), --block-size 32,
and --dtype float32 if the CPU has no bf16 arithmetic. {DISABLE_VARIABLE}=1 serves the same model with the stock cache.
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
    config = SpectralConfig(path, profile.digest, exempt, **exact_fields(args))
    from vllm_spectral_server.launch import serve

    serve(model, args.model, profile, config, args.rest)
    return 0
