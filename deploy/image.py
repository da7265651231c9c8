"""Build the image of the CPU or the CUDA server from this checkout."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from deploy.containers import ROOT, Engine, MissingToolError, find_engine, say
from vllm_spectral import __version__

PYTHON_IMAGE = "python:3.11-slim-bookworm"
TAG = "localhost/vllm-spectral:cpu"


def build(engine: Engine, *, tag: str = TAG, base: str = PYTHON_IMAGE, demo_model: bool = False, kind: str = "cpu",
          torch_index: str = "", verbose: bool = False) -> float:  # fmt: skip
    """Build it; the seconds it took.

    Args:
        engine: what builds.
        tag: name of the image.
        base: what it is built on; for ``cpu`` something else stands in where it cannot be had, see
            :meth:`deploy.containers.Engine.base`.
        demo_model: with the embedded model inside.
        kind: ``cpu`` or ``cuda``: which Dockerfile.
        torch_index: where torch's CPU build is found, if pip's own configuration does not say so.
        verbose: show what the engine writes.
    """
    arguments = {
        "BASE_IMAGE": engine.base(base) if kind == "cpu" else base,
        "VERSION": __version__,
        "REVISION": _revision(),
    }
    if kind == "cpu":
        arguments |= {"WITH_DEMO_MODEL": str(int(demo_model)), "TORCH_INDEX": torch_index}
    say(
        f"building {tag} from deploy/Dockerfile.{kind} on {arguments['BASE_IMAGE']} (minutes at first, seconds from then on)"
    )
    start = time.monotonic()
    engine.build(ROOT / "deploy" / f"Dockerfile.{kind}", tag, arguments, verbose=verbose)
    return time.monotonic() - start


def _revision() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all commands that build an image take."""
    parser.add_argument("--base", default=PYTHON_IMAGE, help="image with Python 3.11 to build on (%(default)s)")
    parser.add_argument(
        "--torch-index", default="", help="where torch's CPU build is found, if your package index lacks it"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the engine writes while it builds")


def main() -> int:
    """Build; 0, or 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--tag", default=TAG, help="name of the image (%(default)s)")
    parser.add_argument("--demo-model", action="store_true", help="bake the embedded model in (270 MB)")
    arguments = parser.parse_args()
    try:
        engine = find_engine()
        seconds = build(engine, tag=arguments.tag, base=arguments.base, demo_model=arguments.demo_model,
                        torch_index=arguments.torch_index, verbose=arguments.verbose)  # fmt: skip
    except MissingToolError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    say(
        f"{arguments.tag}: {engine.inspect(arguments.tag)['Size'] / 1e9:.2f} GB in {seconds:.0f} s; run it with {engine.name}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
