"""Everything that waits for a GPU, in one command: ``python -m benchmarks.gpu``.

Run from the repository's root. Four stages, each a process of its own whose output is shown and kept:

    kernels         kernels against the float64 reference, tuning, decoding and storing beside rivals
                    (``benchmarks.gpu.attention``; torch, Triton and numpy)
    kernel-tests    ``tests/triton/device`` (and pytest, hypothesis, this package)
    backend-tests   ``tests/cuda/device`` (and vLLM for CUDA)
    engine          whole vLLM, cache beside cache (``benchmarks.gpu.engine``; the same)

A stage that fails or for which something is missing does not keep the others from running. When ``--minutes`` are over,
the stage at work is ended, and those after it are named as not run. What is found lies in ``--output``: a log and, of
benchmarks, a JSON file per stage, and ``gpu-summary.json`` of the last call. The exit code is 0 only if every stage that was
asked for passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of its files.
        needs: modules without which it is not started.
        command: arguments of Python; ``{json}`` stands for the file of its results.
    """

    name: str
    needs: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: ``passed``, ``failed``, ``out of time``, or ``not run`` with the reason."""

    stage: str
    status: str
    seconds: float = 0.0
    why: str = ""


_GRACE = 10.0
"""Seconds from the interruption of a stage to its end by force. Interrupted, a stage ends its engines, which are in sessions
of their own, and pytest tells what it has."""
_TESTS = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
STAGES = (
    Stage("kernels", ("triton", "numpy"), ("-m", "benchmarks.gpu.attention", "--tune", "--json", "{json}")),
    Stage("kernel-tests", ("triton", "pytest", "hypothesis"), (*_TESTS, "tests/triton/device")),
    Stage("backend-tests", ("vllm", "pytest", "hypothesis"), (*_TESTS, "tests/cuda/device")),
    Stage("engine", ("vllm",), ("-m", "benchmarks.gpu.engine", "--json", "{json}")),
)


def run(stage: Stage, output: Path, seconds: float) -> Outcome:
    """Run a stage: its output goes to the terminal and into ``gpu-NAME.log``.

    Args:
        stage: what to run.
        output: directory of what it leaves.
        seconds: after which it is ended.
    """
    if missing := [name for name in stage.needs if find_spec(name) is None]:
        return Outcome(stage.name, "not run", why=f"missing: {', '.join(missing)}")
    if seconds <= 0:
        return Outcome(stage.name, "not run", why="no time was left")
    results = output / f"gpu-{stage.name}.json"
    results.unlink(missing_ok=True)
    command = [sys.executable, *(part.replace("{json}", str(results)) for part in stage.command)]
    started, late = time.monotonic(), threading.Event()
    with (output / f"gpu-{stage.name}.log").open("w") as log:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip

        def end() -> None:
            if child.poll() is None:
                late.set()
            _signal(child, signal.SIGINT)

        timers = [threading.Timer(seconds, end), threading.Timer(seconds + _GRACE, _signal, (child, signal.SIGKILL))]
        for timer in timers:
            timer.start()
        try:
            assert child.stdout
            for line in child.stdout:
                print(line, end="", flush=True)
                log.write(line)
                log.flush()
            code = child.wait()
        except BaseException:
            _signal(child, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_GRACE)
            raise
        finally:
            for timer in timers:
                timer.cancel()
            _signal(child, signal.SIGKILL)
    taken = time.monotonic() - started
    if late.is_set():
        return Outcome(stage.name, "out of time", taken)
    return Outcome(stage.name, "failed" if code else "passed", taken, f"exit code {code}" if code else "")


def _signal(child: subprocess.Popen[str], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def run_all(stages: Sequence[Stage], output: Path, seconds: float, about: dict[str, str]) -> list[Outcome]:
    """Run stages one after the other; the summary is written after each.

    Args:
        stages: what to run.
        output: where results go; made if need be.
        seconds: for all of them.
        about: what the summary says of the machine.
    """
    output.mkdir(parents=True, exist_ok=True)
    until, outcomes = time.monotonic() + seconds, list[Outcome]()
    for number, stage in enumerate(stages, 1):
        print(f"[{number}/{len(stages)}] {stage.name}", flush=True)
        outcomes.append(run(stage, output, until - time.monotonic()))
        summary = {**about, "stages": [asdict(outcome) for outcome in outcomes]}
        (output / "gpu-summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return outcomes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    found.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help="these stages (all)")
    found.add_argument(
        "--output", type=Path, default=Path("benchmarks/results"), help="where results go (benchmarks/results)"
    )
    found.add_argument("--minutes", type=float, default=60.0, help="for all stages together (60)")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the stages; 2 where there is no GPU to run them on."""
    args = parser().parse_args(argv)
    import torch

    if not torch.cuda.is_available():
        print("No NVIDIA GPU here. What can be said without one: make test, and python -m benchmarks.gpu.compiled")
        return 2
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:] if argv is None else argv),
    }
    # A shell that starts this in the background has it ignore interruptions, and its children with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    stages = [stage for stage in STAGES if stage.name in args.only]
    outcomes = run_all(stages, args.output, 60 * args.minutes, about)
    for outcome in outcomes:
        print(f"{outcome.stage:14} {outcome.status:12} {outcome.seconds:6.0f} s  {outcome.why}")
    passed = sum(outcome.status == "passed" for outcome in outcomes)
    print(f"{about['device']}: {passed} of {len(outcomes)} stages passed; results in {args.output}")
    return int(passed < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
