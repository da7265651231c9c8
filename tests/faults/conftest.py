"""Servers to break, and the account of what breaking them did: one row per fault, a line at the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pytest

from benchmarks.measure import CIRCUMSTANCES
from deploy.process import ServerProcess, command, running
from tests.environment import BATCH_INVARIANT
from tests.faults.traffic import Load, Outcome, company, prompts

POOL = "64M"
FLAGS = ("--max-model-len", "2048", "--kv-cache-memory-bytes", POOL, "--exact-memory-bytes", "0")
"""Without the exact tier greedy text depends on nothing that a fault changes; with it, the last bits depend on whether its
copies are still there (see the contract in docs/architecture.md)."""
ANSWER_TOKENS = 64
Serving = Callable[..., contextlib.AbstractContextManager[ServerProcess]]


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        fault: what was done.
        seen: by the clients.
        completed, wrong: answers that came, and those of them that differ from an undisturbed run's.
        recovery_seconds: until the same requests were answered again; None where nothing had to recover.
    """

    fault: str
    seen: str
    completed: int
    wrong: int
    recovery_seconds: float | None = None


_ROWS: list[Row] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fault-report", type=Path, help="where the account is written, as JSON")
    parser.addoption("--overload-seconds", type=float, default=60.0, help="how long the overload lasts (%(default)s)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "faults" in item.path.parts:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _ROWS:
        return
    for row in _ROWS:
        recovery = "" if row.recovery_seconds is None else f"; well again after {row.recovery_seconds:.1f} s"
        terminalreporter.write_line(f"{row.fault}: {row.seen}; {row.completed} answers, {row.wrong} wrong{recovery}")
    slowest = max((row.recovery_seconds or 0.0) for row in _ROWS)
    completed, wrong = (sum(getattr(row, name) for row in _ROWS) for name in ("completed", "wrong"))
    terminalreporter.write_line(
        f"{len(_ROWS)} faults: {completed} completed answers, {wrong} wrong; slowest recovery {slowest:.1f} s"
    )
    path: Path | None = config.getoption("--fault-report")
    if path:
        path.write_text(json.dumps(CIRCUMSTANCES | {"faults": [asdict(row) for row in _ROWS]}, indent=1) + "\n")


@pytest.fixture(scope="session")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile that needs no engine run: what breaks here does not depend on how good it is."""
    path = tmp_path_factory.mktemp("profile") / "instant.spectral"
    subprocess.run(command("calibrate", "demo", "-o", str(path), "--preset", "instant"), check=True)
    return path


@pytest.fixture
def serve(profile: Path, tmp_path: Path) -> Serving:
    """Start the server as a user would, with more flags, another profile or more of an environment."""

    def start(
        *flags: str, port: int = 0, path: Path | None = None, environment: dict[str, str] | None = None
    ) -> contextlib.AbstractContextManager[ServerProcess]:
        argv = command("serve", "demo", "--profile", str(path or profile), *FLAGS, *flags)
        return running(argv, tmp_path / "server.log", BATCH_INVARIANT | (environment or {}), port)

    return start


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """The prompts that every test asks."""
    return prompts(24)


@pytest.fixture(scope="session")
def reference(profile: Path, texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str | None]:
    """The answers of a server that nothing disturbs."""
    argv = command("serve", "demo", "--profile", str(profile), *FLAGS)
    with running(argv, tmp_path_factory.mktemp("reference") / "log", BATCH_INVARIANT) as server, company(server.url):
        found = Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()
    assert all(outcome.status == 200 for outcome in found)
    return [outcome.text for outcome in found]


@dataclass(frozen=True)
class Account:
    """Counts answers against the reference, and keeps a row per fault."""

    reference: Sequence[str | None]

    def wrong(self, outcomes: Sequence[Outcome]) -> int:
        """Completed answers that differ from the undisturbed ones."""
        pairs = zip(outcomes, self.reference, strict=True)
        return sum(outcome.text is not None and outcome.text != text for outcome, text in pairs)

    def add(
        self, fault: str, seen: str, runs: Sequence[Sequence[Outcome]], recovery_seconds: float | None = None
    ) -> None:
        """Keep a row, and demand that no answer is wrong."""
        completed = sum(outcome.text is not None for run in runs for outcome in run)
        row = Row(fault, seen, completed, sum(map(self.wrong, runs)), recovery_seconds)
        _ROWS.append(row)
        assert row.wrong == 0, (
            f"{row.wrong} of {completed} answers differ from an undisturbed run's: {self._apart(runs)}"
        )

    def _apart(self, runs: Sequence[Sequence[Outcome]]) -> str:
        """Which answers differ, and from which character on."""
        found = []
        for number, run in enumerate(runs):
            for index, (outcome, text) in enumerate(zip(run, self.reference, strict=True)):
                if outcome.text is not None and outcome.text != text:
                    pairs = zip(outcome.text, text or "", strict=False)
                    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                    found.append(f"run {number}, prompt {index}, after {same} characters")
        return "; ".join(found)


@pytest.fixture
def account(reference: list[str | None]) -> Account:
    """Of this run."""
    return Account(reference)


def named(server: ServerProcess, title: str) -> psutil.Process:
    """The first of them whose title holds ``title``."""
    return next(child for child in server.descendants() if title in " ".join(child.cmdline()) or title in child.name())
