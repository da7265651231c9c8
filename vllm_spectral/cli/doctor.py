"""``vllm-spectral doctor``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vllm_spectral.cli.common import MODEL_HELP, described, load_for, print_json
from vllm_spectral.errors import SpectralError
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.versions import require_tested_vllm


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="can this model be served, and if not why",
        description="Check vLLM's version, the model and, if given, the profile, without loading the model. "
        "Exit code 0: it can be served; 2: it cannot, and every reason is listed.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--profile", metavar="PROFILE", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def _geometry(model: ModelDescription) -> str:
    model.require_supported()
    return (
        f"{model.num_layers} layers, {model.num_query_heads} query heads, "
        f"{model.num_kv_heads} KV heads, head_dim {model.head_dim}"
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, also after a first failure, so that one run names all that is wrong."""
    checks: list[dict[str, Any]] = []

    def check(name: str, action: Any) -> Any:
        try:
            value = action()
        except SpectralError as error:
            checks.append({"check": name, "ok": False, "detail": str(error)})
            return None
        checks.append({"check": name, "ok": True, "detail": str(value)})
        return value

    check("vllm", require_tested_vllm)
    model = check("model", lambda: described(args.model))
    if model:
        check("attention", lambda: _geometry(model))
        check("weights", lambda: f"fingerprint {model.fingerprint().weights[:12]}")
        if args.profile:
            check("profile", lambda: f"digest {load_for(model, args.profile).digest[:12]}")
    ok = all(entry["ok"] for entry in checks)
    if args.json:
        print_json({"model": args.model, "servable": ok, "checks": checks})
    else:
        for entry in checks:
            sys.stdout.write(f"{'ok  ' if entry['ok'] else 'FAIL'}  {entry['check']}: {entry['detail']}\n")
        sys.stdout.write(f"{args.model} {'can' if ok else 'cannot'} be served from spectral pages\n")
    return 0 if ok else SpectralError.exit_code
