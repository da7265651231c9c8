"""The image installs ``requirements/runtime.lock`` and nothing else: it must be complete, and hold no more."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
# The head of the file gives the reasons.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton"}


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (REQUIREMENTS / name).read_text().splitlines() if "==" in line and line[0] != "#"]
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


def wanted(root: str) -> set[str]:
    """Every distribution that ``root`` asks for, directly or not, on this platform."""
    extras: dict[str, set[str]] = {}
    todo = [Requirement(root)]
    while todo:
        requirement = todo.pop()
        name, asked = str(canonicalize_name(requirement.name)), {"", *requirement.extras}
        if name in LEFT_OUT or asked <= extras.get(name, set()):
            continue
        extras[name] = extras.get(name, set()) | asked
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in asked):
                todo.append(needed)
    return set(extras) - {str(canonicalize_name(Requirement(root).name))}


def test_the_image_gets_what_a_server_needs_and_no_more() -> None:
    assert set(pins("runtime.lock")) == wanted("vllm-spectral[cpu]")


def test_every_pin_has_one_place() -> None:
    assert not set(pins("runtime.lock")) & set(pins("cpu.lock"))


def test_the_pins_are_what_runs_here() -> None:
    installed = {name: importlib.metadata.version(name) for name in pins("runtime.lock")}
    assert installed == pins("runtime.lock")
