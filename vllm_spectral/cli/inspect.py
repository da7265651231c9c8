"""``vllm-spectral inspect``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from vllm_spectral.cli.common import print_json


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "inspect",
        help="spectra, bits, bytes per token, provenance",
        description="Show what a profile holds. Verifies its schema and digest on the way.",
    )
    parser.add_argument("profile", metavar="PROFILE", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", type=Path, help="plot spectra and bits per layer")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, verify, show."""
    from vllm_spectral.profile.report import plot_profile, summarize
    from vllm_spectral.profile.storage import load_profile

    profile = load_profile(args.profile)
    summary = summarize(profile)
    if args.plot:
        plot_profile(profile, args.plot)
    if args.json:
        print_json(dataclasses.asdict(summary))
    else:
        _print_tables(summary)
    return 0


def _print_tables(summary: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    # What a file says is shown as it stands, brackets and all.
    console = Console(markup=False, highlight=False)
    facts = Table(title=f"profile {summary.name}", show_header=False)
    for name, value in dataclasses.asdict(summary).items():
        if name == "layers":
            continue
        rows = value.items() if isinstance(value, dict) else [(name, value)]
        for key, item in rows:
            facts.add_row(str(key).replace("_", " "), f"{item:.3f}" if isinstance(item, float) else str(item))
    console.print(facts)
    layers = Table(title="layers (means over KV heads)")
    for column in ("layer", "key bits", "value bits", "key effective rank", "value effective rank"):
        layers.add_column(column, justify="right")
    for layer in summary.layers:
        layers.add_row(
            str(layer.index), f"{layer.key_bits:.2f}", f"{layer.value_bits:.2f}",
            f"{layer.key_effective_rank:.1f}", f"{layer.value_effective_rank:.1f}",
        )  # fmt: skip
    console.print(layers)
