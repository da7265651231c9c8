"""``vllm-spectral evaluate``."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spectral.cli.common import MODEL_HELP, add_verbose, described, load_for, print_json, quiet_vllm
from vllm_spectral.versions import require_tested_vllm

if TYPE_CHECKING:
    from vllm_spectral.evaluation.run import TextResult

_DESCRIPTION = """\
Compare answers from compressed pages with those of an exact cache, through the real engine, on the same windows of
text in one run. Every token reads all of its context, itself included, from compressed pages: what it would see when
it is generated. Use text that the profile was not calibrated on.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="fidelity of a profile on your text",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--profile", metavar="PROFILE", type=Path, required=True)
    parser.add_argument("--text", metavar="FILE", type=Path, nargs="+", required=True, help="UTF-8 text")
    parser.add_argument("--context", type=int, default=1024, help="tokens per window (1024)")
    parser.add_argument("--windows", type=int, default=8, help="most windows per file, spread evenly over it (8)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    require_tested_vllm()
    quiet_vllm(args.verbose)
    from vllm_spectral.evaluation.run import evaluate

    model = described(args.model)
    model.require_supported()
    path = Path(os.path.abspath(args.profile))  # noqa: PTH100 - keeps symbolic links, vLLM may run elsewhere
    profile = load_for(model, path)
    results = evaluate(model, profile, path, args.text, context=args.context, windows=args.windows)
    if args.json:
        print_json(
            {
                "model": args.model,
                "profile": {
                    "name": profile.name,
                    "digest": profile.digest,
                    "bits_per_element": profile.bits_per_element,
                },
                "context": args.context,
                "texts": [dataclasses.asdict(result) for result in results],
            }
        )
    else:
        _print_table(args.model, profile.name, results)
    return 0


def _print_table(model: str, profile: str, results: Sequence[TextResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{model} from {profile}, against the exact cache")
    for column in ("text", "tokens", "perplexity exact", "compressed", "delta", "KL (nats)", "top-1 same"):
        table.add_column(column, justify="left" if column == "text" else "right")
    for r in results:
        error = f" ± {r.kl_error:.4f}" if r.kl_error is not None else ""
        table.add_row(
            r.text, str(r.tokens), f"{r.perplexity_exact:.3f}", f"{r.perplexity:.3f}", f"{r.delta_percent:+.2f} %",
            f"{r.kl:.4f}{error}", f"{100 * r.top1:.1f} %",
        )  # fmt: skip
    Console().print(table)
