"""Texts that every Python brings, so that quality can be measured without a data set.

Two disjoint sets: designs are chosen on ``TUNING`` and reported on ``HELD_OUT``.

Usage: ``python -m benchmarks.texts held-out DIRECTORY`` writes ``prose.txt`` and ``code.txt``.
"""

from __future__ import annotations

import argparse
import asyncio.base_events
import email.message
import inspect
import pydoc_data.topics
import shutil
import statistics
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

TUNING: dict[str, tuple[ModuleType, ...]] = {"code": (statistics, asyncio.base_events)}
HELD_OUT: dict[str, tuple[ModuleType, ...]] = {"code": (argparse, shutil, tarfile, email.message, zipfile)}


def prose(name: str) -> str:
    """Technical prose: half of the language reference's topics for each set."""
    topics = pydoc_data.topics.topics
    keys = sorted(topics)
    return "\n\n".join(topics[key] for key in (keys[::2] if name == "tuning" else keys[1::2]))


def code(name: str) -> str:
    """Source code of modules of the standard library."""
    modules = (TUNING if name == "tuning" else HELD_OUT)["code"]
    return "\n".join(inspect.getsource(module) for module in modules)


def write(name: str, directory: Path) -> dict[str, Path]:
    """Write a set; returns the paths by domain."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {"prose": directory / "prose.txt", "code": directory / "code.txt"}
    paths["prose"].write_text(prose(name), encoding="utf-8")
    paths["code"].write_text(code(name), encoding="utf-8")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=("tuning", "held-out"))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    sys.stdout.write("\n".join(map(str, write(arguments.set, arguments.directory).values())) + "\n")
