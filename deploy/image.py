"""Build the image of the CPU or the CUDA server from this checkout."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from deploy.containers import ROOT, Engine, MissingToolError, find_engine, say
from vllm_spectral import __version__


def named_base(dockerfile: Path) -> str:
    """The base image that a Dockerfile names by default."""
    found = re.search(r"^ARG BASE_IMAGE=(\S+)$", dockerfile.read_text(), re.MULTILINE)
    assert found, f"{dockerfile} names no base image"
    return found[1]


def build(engine: Engine, *, tag: str, base: str | None = None, demo_model: bool = False, kind: str = "cpu",
          torch_index: str = "", verbose: bool = False) -> float:  # fmt: skip
    """Build it; the seconds it took.

    Args:
        engine: what builds.
        tag: name of the image.
        base: what it is built on, if not what the Dockerfile names; for ``cpu`` something else stands in where it cannot be
            had, see :meth:`deploy.containers.Engine.base`.
        demo_model: with the embedded model inside.
        kind: ``cpu`` or ``cuda``: which Dockerfile.
        torch_index: where torch's CPU build is found, if pip's own configuration does not say so.
        verbose: show what the engine writes.
    """
    dockerfile = ROOT / "deploy" / f"Dockerfile.{kind}"
    base = base or named_base(dockerfile)
    arguments = {"VERSION": __version__, "REVISION": _revision()}
    if kind == "cpu":
        base = engine.base(base)
        arguments |= {"WITH_DEMO_MODEL": str(int(demo_model)), "TORCH_INDEX": torch_index}
    say(f"building {tag} from {dockerfile.relative_to(ROOT)} on {base} (minutes at first, seconds from then on)")
    start = time.monotonic()
    engine.build(dockerfile, tag, arguments | {"BASE_IMAGE": base}, verbose=verbose)
    return time.monotonic() - start


def _revision() -> str:
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What all commands that build an image take."""
    parser.add_argument("--base", help="image to build on (what the Dockerfile names)")
    parser.add_argument(
        "--torch-index", default="", help="where torch's CPU build is found, if your package index lacks it"
    )
    parser.add_argument("--verbose", action="store_true", help="show what the engine writes while it builds")


def main() -> int:
    """Build; 0, 1 if it fails, 2 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--kind", choices=("cpu", "cuda"), default="cpu", help="which Dockerfile (%(default)s)")
    parser.add_argument("--tag", help="name of the image (localhost/vllm-spectral:KIND)")
    parser.add_argument("--demo-model", action="store_true", help="bake the embedded model in (270 MB)")
    arguments = parser.parse_args()
    tag = arguments.tag or f"localhost/vllm-spectral:{arguments.kind}"
    flags = {name: getattr(arguments, name) for name in ("kind", "base", "demo_model", "torch_index", "verbose")}
    try:
        engine = find_engine()
        seconds = build(engine, tag=tag, **flags)
    except MissingToolError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except RuntimeError as error:
        sys.stderr.write(f"FAILED: {error}\n")
        return 1
    say(f"{tag}: {engine.inspect(tag)['Size'] / 1e9:.2f} GB in {seconds:.0f} s; run it with {engine.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
