"""Loads thousands of hostile profiles. Each must be refused with a clear error, or be sound to the last kernel.

    python -m tests.fuzz.profiles --cases 10000 --seed 1

The cases run in a process of their own with little memory to spare and little time each, so that a crash, a hang or a
decompression bomb is found and not suffered. A failing file is saved, and shrunk first where Python still runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.forgery import DIM, HEADS, forged_files, original, original_bytes
from vllm_spectral.cli.main import main as command
from vllm_spectral.errors import ProfileError
from vllm_spectral.kernels.interface import Requests
from vllm_spectral.kernels.layer import NativeLayer
from vllm_spectral.profile.schema import Expectation, Profile
from vllm_spectral.profile.storage import load_profile, save_profile

CASE_SECONDS = 10
"""Of the processor."""
WAIT_SECONDS = 60
SPARE_BYTES = 256 << 20
"""What a case may take beyond what the process has after a sound one; the files themselves have about 70 KiB."""
SILENT_SECONDS = 300
BATCH = 250
LONGEST_MESSAGE = 1200
BLOCK = 32


class EscapedError(AssertionError):
    """A hostile file did what it should not have done."""


def judge(path: Path, same: bool) -> str:
    """Load a file; what became of it.

    Args:
        path: the file.
        same: whatever loads must be the original, because the digest was left as it was.

    Raises:
        EscapedError: if it was neither refused clearly nor sound.
    """
    try:
        profile = load_profile(path)
    except ProfileError as error:
        _require_clear(error, path)
        return type(error).__name__
    _exercise(profile)
    if _equal(profile, original()):
        return "the original"
    if same:
        raise EscapedError("another profile than the one that the digest belongs to")
    return "another sound profile"


def _require_clear(error: ProfileError, path: Path) -> None:
    message = str(error)
    named = str(path) if str(path).isprintable() and len(str(path)) < 200 else ""
    if error.exit_code != 2 or len(message) > LONGEST_MESSAGE or named not in message:
        raise EscapedError(f"an unclear error: {message[:LONGEST_MESSAGE]!r}")
    if not message.isprintable():
        raise EscapedError(f"an error with control characters: {message[:LONGEST_MESSAGE]!r}")


def _equal(one: Profile, other: Profile) -> bool:
    plain = [
        dataclasses.replace(p, digest="", codebooks=other.codebooks, layers=other.layers, expectation=None,
                            provenance=dataclasses.replace(p.provenance, created=""))
        for p in (one, other)
    ]  # fmt: skip
    layers = zip(one.layers, other.layers, strict=True)
    return (
        plain[0] == plain[1]
        and torch.equal(one.codebooks.levels, other.codebooks.levels)
        and _expect_the_same(one.expectation, other.expectation)
        and all(torch.equal(a, b) for x, y in layers for a, b in zip(vars(x).values(), vars(y).values(), strict=True))
    )


def _expect_the_same(one: Expectation | None, other: Expectation | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.tokens == other.tokens and torch.equal(one.figures, other.figures)


def _exercise(profile: Profile) -> None:
    """What is done with a profile that loads: write it, show it, build its codecs, run the kernels next to guarded bytes."""
    if profile.expectation is not None and not all(map(math.isfinite, profile.expectation.of_layer(0, 2))):
        raise EscapedError("what is expected of the canary is no number")
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again"
        if save_profile(profile, again).digest != profile.digest or not _equal(load_profile(again), profile):
            raise EscapedError("it is not written as it was read")
        # A plot takes half a second, and only its title is the file's own: dollars are formulas to it.
        plot = ["--plot", str(again.with_suffix(".png"))] if "$" in profile.name else []
        for flags in ([], ["--json", *plot]):
            with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
                code = command(["inspect", str(again), *flags])
            if code or err.getvalue():
                raise EscapedError(f"inspect left with {code}: {err.getvalue()[:LONGEST_MESSAGE]}")
            out.getvalue().encode()
    generator = torch.Generator().manual_seed(0)
    for layer in profile.layers:
        codec = layer.codec(profile.slot_bytes, profile.codebooks)
        native = NativeLayer(codec)
        for scale in (1.0, 1e4):
            keys, values = (torch.randn(40, HEADS, DIM, generator=generator) * scale for _ in range(2))
            guarded = torch.full((4, HEADS, BLOCK, profile.slot_bytes), 0xA5, dtype=torch.uint8)
            pages = guarded[1:3]
            native.store(keys, values, pages, torch.arange(40))
            query, output = keys.bfloat16(), torch.zeros(40, HEADS, DIM, dtype=torch.bfloat16)
            requests = Requests(
                torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([0, 40], dtype=torch.int32),
                torch.tensor([40], dtype=torch.int32),
            )  # fmt: skip
            native.attend(query, keys.bfloat16(), values.bfloat16(), pages, requests, output, DIM**-0.5)
            if not (bool((guarded[0] == 0xA5).all()) and bool((guarded[3] == 0xA5).all())):
                raise EscapedError("the kernels wrote outside their pages")


# Paths that are no files ----------------------------------------------------------------------------------------------------


def _sparse(path: Path, size: int, content: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    return path


def _lying_geometry(path: Path) -> Path:
    """A sparse file whose header asks for the largest bases that the schema has, consistently: no lie but its emptiness."""
    content = original_bytes()
    size = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + size])
    header = json.loads(table["__metadata__"]["vllm_spectral"])
    header["fingerprint"] |= {"num_layers": 2048, "num_kv_heads": 1024, "head_dim": 256}
    header["num_layers"] = 2048
    table["__metadata__"]["vllm_spectral"] = json.dumps(header)
    text = json.dumps(table).encode()
    return _sparse(path, 1 << 40, len(text).to_bytes(8, "little") + text)


def odd_paths(folder: Path) -> Iterator[tuple[str, Path | str]]:
    """Names of things that are not profiles: none may be waited for, followed for ever or read to its end."""
    good = folder / "good.spectral"
    good.write_bytes(original_bytes())
    (folder / "directory").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nothing")
    (folder / "to-device").symlink_to("/dev/zero")
    (folder / "to-good").symlink_to(good)
    (folder / "empty").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    for name in ("directory", "pipe", "loop", "dangling", "to-device", "to-good", "empty", "socket", "nothing"):
        yield name, folder / name
    yield from ((name, name) for name in ("/dev/zero", "/dev/null", "/dev/urandom", "/dev/stdin", "/proc/self/mem"))
    yield "a file of the kernel without a size", "/proc/self/maps"
    yield "a file as directory", good / "x"
    yield "too long", folder / ("x" * 5000)
    yield "too deep", "/".join([str(folder), *["x"] * 5000])
    yield "a zero byte", f"{folder}/a\0b"
    yield "control characters", f"{folder}/\x1b[2Jx"
    yield "traversal", folder / ".." / ".." / ".." / ".." / "etc" / "passwd"
    yield "sparse terabyte", _sparse(folder / "sparse", 1 << 40)
    yield "sparse below the limit", _sparse(folder / "sparse-4g", 4 << 30)
    yield "sparse behind a sound start", _sparse(folder / "sparse-tail", 1 << 36, original_bytes())
    yield "sparse of a huge model", _lying_geometry(folder / "sparse-model")
    yield "sparse header", _sparse(folder / "sparse-header", 1 << 36, (1 << 35).to_bytes(8, "little"))


# The process that suffers it ------------------------------------------------------------------------------------------------


@contextmanager
def _limited() -> Iterator[None]:
    """Both clocks: work is bounded on a machine that is busy with something else, and so is waiting for nothing."""

    def late(number: int, _frame: FrameType | None) -> None:
        work = number == signal.SIGPROF
        raise EscapedError(
            f"it {'worked' if work else 'waited'} for more than {CASE_SECONDS if work else WAIT_SECONDS} s"
        )

    clocks = ((signal.SIGPROF, signal.ITIMER_PROF, CASE_SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, WAIT_SECONDS))
    for number, clock, seconds in clocks:
        signal.signal(number, late)
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for _, clock, _ in clocks:
            signal.setitimer(clock, 0)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def suffer(cases: int, start: int, folder: Path, tell: Callable[[dict[str, Any]], None]) -> None:
    """Run cases in this process, until all are done or one escapes.

    Args:
        cases: how many at least.
        start: the seed; equal seeds give equal cases.
        folder: where the file of the case at hand lies.
        tell: told of progress, and of an escape.
    """
    torch.set_num_threads(1)
    path = folder / "case.spectral"
    path.write_bytes(original_bytes())
    assert judge(path, same=True) == "the original"
    limit = _virtual_bytes() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    slowest = 0.0

    def one(target: Path, same: bool, steps: list[str]) -> None:
        nonlocal slowest
        begin = time.monotonic()
        try:
            with _limited():
                outcomes[judge(target, same)] += 1
        except BaseException as error:
            tell({"escape": f"{type(error).__name__}: {error}"[:2000], "steps": steps})
            raise
        slowest = max(slowest, time.monotonic() - begin)
        if outcomes.total() % 50 == 0:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            tell({"done": outcomes.total(), "outcomes": outcomes, "slowest": slowest, "grown": grown << 10})

    for name, odd in odd_paths(Path(tempfile.mkdtemp(dir=folder))):
        one(Path(odd), True, [name])
    batch = 0
    while outcomes.total() < cases:

        @seed(start + batch)
        @settings(
            max_examples=BATCH, database=None, deadline=None, phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(forged_files())
        def generated(case: tuple[bytes, bool, list[str]]) -> None:
            content, renewed, steps = case
            path.write_bytes(content)
            one(path, not renewed, steps)

        generated()
        batch += 1
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    tell({"done": outcomes.total(), "outcomes": outcomes, "slowest": slowest, "grown": grown << 10, "end": True})


# The process that watches ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Result:
    """What came of it; ``escape`` is empty if nothing escaped."""

    done: int = 0
    outcomes: dict[str, int] = dataclasses.field(default_factory=dict)
    slowest: float = 0.0
    grown: int = 0
    end: bool = False
    escape: str = ""
    steps: list[str] = dataclasses.field(default_factory=list)

    def update(self, told: dict[str, Any]) -> None:
        """Take over what the other process tells."""
        for name, value in told.items():
            setattr(self, name, value)


def watch(cases: int, start: int, save: Path, progress: Callable[[int], None] = lambda _: None) -> Result:
    """Let a process of its own load so many hostile files.

    Args:
        cases: how many.
        start: the seed.
        save: where a file that escapes is kept.
        progress: told how many are done.
    """
    result = Result()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        argv = [
            sys.executable,
            "-m",
            "tests.fuzz.profiles",
            "--cases",
            str(cases),
            "--seed",
            str(start),
            "--suffer",
            name,
        ]
        with (folder / "stderr").open("wb") as errors:
            child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL)
        assert child.stdout is not None
        alarm = threading.Timer(SILENT_SECONDS, child.kill)
        alarm.start()
        for line in child.stdout:
            alarm.cancel()
            alarm = threading.Timer(SILENT_SECONDS, child.kill)
            alarm.start()
            result.update(json.loads(line))
            progress(result.done)
        code = child.wait()
        alarm.cancel()
        if not result.end and not result.escape:
            result.escape = f"the process ended with {code}: " + (folder / "stderr").read_text(errors="replace")[-2000:]
        if result.escape and (folder / "case.spectral").exists():
            save.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "case.spectral", save / f"escaped-{start}.spectral")
    return result


def main() -> int:
    """Run, show progress, say in one line what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.profiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000, help="how many files (%(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run; by default a new one")
    parser.add_argument(
        "--save", type=Path, default=Path("build/fuzz"), help="where a file that escapes is kept (%(default)s)"
    )
    parser.add_argument("--suffer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    start = secrets.randbits(32) if arguments.seed is None else arguments.seed
    if arguments.suffer:
        telling = os.fdopen(os.dup(1), "w", buffering=1)
        suffer(arguments.cases, start, arguments.suffer, lambda told: print(json.dumps(told), file=telling))
        return 0
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    print(f"fuzzing profiles, seed {start}", file=sys.stderr)
    columns = (TextColumn("profiles"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=arguments.cases)
        result = watch(
            arguments.cases, start, arguments.save, lambda done: bar.update(task, completed=min(done, arguments.cases))
        )
    counts = ", ".join(f"{count} {name}" for name, count in sorted(result.outcomes.items(), key=lambda item: -item[1]))
    verdict = "nothing escaped" if not result.escape else f"ESCAPED, kept in {arguments.save}"
    print(
        f"fuzz profiles: {result.done} files, seed {start}: {verdict}; {counts}; slowest {result.slowest:.2f} s, "
        f"memory grew by {result.grown / 2**20:.0f} MiB"
    )
    if result.escape:
        print(f"{result.escape}\nsteps: {'; '.join(result.steps)}", file=sys.stderr)
    return bool(result.escape)


if __name__ == "__main__":
    sys.exit(main())
