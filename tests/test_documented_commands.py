"""The commands that the documents show: all are commands that exist, with flags that exist, and the marked ones are run.

A block with ``<!-- run -->`` on the line before it is run as it stands, line by line, in a folder of its own, by
``make docs-test``; what serves is started, waited for and stopped at the end of the block.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.process import ServerProcess, command, running
from tests.fuzz.forgery import original_bytes
from vllm_spectral.cli.main import build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
RUN = "<!-- run -->"
_BLOCK = re.compile(r"(?P<mark>^" + RUN + r"\n)?^```(?:bash)?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = 900


@dataclass(frozen=True)
class Block:
    """A block of commands in a document."""

    document: str
    lines: tuple[str, ...]
    marked: bool


def blocks() -> Iterator[Block]:
    for document in DOCUMENTS:
        for match in _BLOCK.finditer(document.read_text()):
            joined = match["text"].replace("\\\n", " ")
            lines = tuple(line for line in map(str.strip, joined.splitlines()) if line and line[0] != "#")
            yield Block(str(document.relative_to(ROOT)), lines, bool(match["mark"]))


BLOCKS = list(blocks())
OURS = [(b.document, line) for b in BLOCKS for line in b.lines if line.startswith("vllm-spectral ")]
TARGETS = [(b.document, line) for b in BLOCKS for line in b.lines if line.startswith("make ")]
MODULES = [(b.document, line) for b in BLOCKS for line in b.lines if line.startswith("python -m ")]
MARKED = [b for b in BLOCKS if b.marked]


def words(line: str) -> list[str]:
    return shlex.split(line, comments=True)


def test_the_documents_have_commands() -> None:
    assert len(OURS) > 8 and len(TARGETS) > 8 and len(MODULES) > 3 and MARKED


@pytest.mark.parametrize(("document", "line"), OURS)
def test_every_command_is_one(document: str, line: str) -> None:
    args, rest = build_parser().parse_known_args(words(line)[1:])
    assert not rest or args.passes_flags_on
    if rest:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        make_arg_parser(FlexibleArgumentParser()).parse_args(rest)


@pytest.mark.parametrize(("document", "line"), TARGETS)
def test_every_target_is_one(document: str, line: str) -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words(line)[1:] if "=" not in word} <= known


@pytest.mark.parametrize(("document", "line"), MODULES)
def test_every_module_is_one(document: str, line: str) -> None:
    place = ROOT / words(line)[2].replace(".", "/")
    assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()


def test_a_profile_is_inspected_as_documented(tmp_path: Path) -> None:
    (tmp_path / "demo.spectral").write_bytes(original_bytes())
    (line,) = {line for _, line in OURS if line.startswith("vllm-spectral inspect")}
    subprocess.run(command(*words(line)[1:]), cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "spectra.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.document)
def test_marked_blocks_do_what_they_say(block: Block, tmp_path: Path) -> None:
    (tmp_path / "my.txt").write_text((ROOT / "LICENSE").read_text())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "TERM": "dumb"}
    with ExitStack() as stack:
        for line in block.lines:
            argv = words(line)
            print("$", line, flush=True)
            if argv[:2] == ["vllm-spectral", "serve"]:
                stack.enter_context(serving(argv, tmp_path))
            else:
                once = ["--once"] if argv[:2] == ["vllm-spectral", "top"] else []
                subprocess.run([*argv, *once], cwd=tmp_path, env=environment, check=True, timeout=SECONDS)


def serving(argv: list[str], folder: Path) -> ExitStack:
    """The documented server, on its documented port, with paths as seen from ``folder``."""
    stack = ExitStack()
    port = int(argv.pop(argv.index("--port") + 1))
    argv.remove("--port")
    argv = [str(folder / word) if word.endswith(".spectral") else word for word in argv[1:]]
    server: ServerProcess = stack.enter_context(running(command(*argv), folder / "server.log", port=port))
    assert server.url.endswith(str(port))
    return stack
