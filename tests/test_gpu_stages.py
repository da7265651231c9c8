"""The one command for machines with a GPU: what its stages leave behind, and that none keeps the others from running."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.gpu.__main__ import STAGES, Stage, main, run_all


def python(name: str, code: str, *needs: str) -> Stage:
    return Stage(name, needs, ("-c", code, "{json}"))


def test_every_stage_has_its_turn_and_what_became_of_it_is_kept(tmp_path: Path) -> None:
    stages = [
        python("good", "import sys; print('fine'); open(sys.argv[1], 'w').write('{}')"),
        python("bad", "print('before'); raise SystemExit(3)"),
        python("absent", "", "json", "no_such_module"),
        python("last", "print('last')"),
    ]
    output = tmp_path / "new" / "results"
    outcomes = run_all(stages, output, 60, {"device": "none"})
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "not run", "passed"]
    assert [outcome.why for outcome in outcomes] == ["", "exit code 3", "missing: no_such_module", ""]
    assert (output / "gpu-good.log").read_text() == "fine\n"
    assert (output / "gpu-good.json").read_text() == "{}"
    assert (output / "gpu-bad.log").read_text() == "before\n"
    summary = json.loads((output / "gpu-summary.json").read_text())
    assert summary["device"] == "none"
    assert [stage["stage"] for stage in summary["stages"]] == ["good", "bad", "absent", "last"]


def test_when_time_is_over_the_stage_ends_with_its_children_and_the_rest_is_named(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; print('started', flush=True); "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    started = time.monotonic()
    outcomes = run_all([python("slow", code), python("late", "")], tmp_path, 5, {})
    assert time.monotonic() - started < 60
    assert [(outcome.status, outcome.why) for outcome in outcomes] == [
        ("out of time", ""), ("not run", "no time was left"),
    ]  # fmt: skip
    assert (tmp_path / "gpu-slow.log").read_text().startswith("started\n")


def test_a_stage_that_is_ended_ends_what_is_in_a_session_of_its_own(tmp_path: Path) -> None:
    """As the engine benchmark does with an engine; where this was started to ignore interruptions, as ``main`` sees to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    code = (
        "import os, signal, subprocess, sys; sleeper = subprocess.Popen("
        "[sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
        "try:\n    print(sleeper.pid, flush=True); sleeper.wait()\n"
        "finally:\n    os.killpg(sleeper.pid, signal.SIGKILL)"
    )
    try:
        (outcome,) = run_all([python("engine", code)], tmp_path, 5, {})
    finally:
        signal.signal(signal.SIGINT, before)
    assert outcome.status == "out of time"
    pid = int((tmp_path / "gpu-engine.log").read_text().split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_stages_run_what_is_there() -> None:
    for stage in STAGES:
        for part in stage.command:
            if "/" in part:
                assert Path(part).is_dir(), part


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path)]) == 2
    assert "No NVIDIA GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
