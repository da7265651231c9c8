"""Bad input is met by one clear line and exit code 2, before any model is loaded."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.check import COMMANDS
from vllm_spectral.cli.common import exact_fields
from vllm_spectral.cli.main import build_parser, main
from vllm_spectral.models.biases import BiasSurvey, KeyBias
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.schema import Profile
from vllm_spectral.profile.storage import load_profile, save_profile
from vllm_spectral.versions import require_tested_vllm


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that would start an engine fails the test."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("an engine was started")

    engine = pytest.importorskip("vllm_spectral.backend.engine")
    monkeypatch.setattr(engine.OfflineEngine, "__init__", refuse)


@pytest.fixture
def foreign(profile: Profile, tmp_path: Path) -> Path:
    """A sound profile of another model."""
    return_path = tmp_path / "foreign.spectral"
    save_profile(profile, return_path)
    return return_path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("vllm-spectral: error: ")
    return error[0]


@pytest.mark.parametrize("command", ["serve", "evaluate"])
def test_profiles_that_cannot_be_used(
    command: str, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    rest = ["--text", str(text)] if command == "evaluate" else []
    assert "no such profile" in refused(capsys, command, "demo", "--profile", str(tmp_path / "none"), *rest)
    assert "another model" in refused(capsys, command, "demo", "--profile", str(foreign), *rest)
    content = foreign.read_bytes()
    foreign.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "does not match its digest" in refused(capsys, command, "demo", "--profile", str(foreign), *rest)
    foreign.write_bytes(content[: len(content) // 2])
    assert "truncated" in refused(capsys, command, "demo", "--profile", str(foreign), *rest)


@pytest.mark.parametrize("bits", ["0", "1.4", "9", "-3", "nan"])
def test_bits_out_of_range(bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--bits" in refused(capsys, "calibrate", "demo", "-o", str(tmp_path / "p"), f"--bits={bits}")


def test_texts_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["-o", str(tmp_path / "p")]
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is empty" in refused(capsys, "calibrate", "demo", *output, "--text", str(empty))
    assert "not UTF-8" in refused(capsys, "calibrate", "demo", *output, "--text", str(binary))
    assert "no such text" in refused(capsys, "calibrate", "demo", *output, "--text", str(tmp_path / "none"))
    assert "hadamard" in refused(capsys, "calibrate", "demo", *output, "--basis", "hadamard", "--text", str(empty))


@pytest.mark.parametrize("command", ["calibrate", "serve", "evaluate"])
def test_models_that_cannot_be_served(
    command: str, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 192, "kv_lora_rank": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = {
        "calibrate": ["-o", str(tmp_path / "p")],
        "serve": ["--profile", str(foreign)],
        "evaluate": ["--profile", str(foreign), "--text", str(foreign)],
    }[command]
    message = refused(capsys, command, str(tmp_path), *flags)
    assert "head_dim 48" in message
    assert "latent" in message
    assert "no such model" in refused(capsys, command, "nothing", *flags)


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "1.0", "unknown"])
def test_an_untested_vllm(
    version: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    assert f"vLLM {version}" in refused(capsys, "calibrate", "demo", "-o", str(tmp_path / "p"))


def test_the_installed_vllm_is_in_the_range() -> None:
    assert require_tested_vllm().startswith("0.32")


def test_hadamard_needs_no_engine_and_doctor_accepts_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "h.spectral"
    assert main(["calibrate", "demo", "-o", str(path), "--basis", "hadamard", "--bits", "3"]) == 0
    assert main(["doctor", "demo", "--profile", str(path), "--json"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(path), "--json", "--plot", str(tmp_path / "p.png")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["bits_per_element"] == 3.0
    assert summary["provenance"]["basis"] == "hadamard"
    assert main(["inspect", str(path)]) == 0


def test_doctor_names_every_fault(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "demo", "--profile", str(foreign), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert not report["servable"]
    assert {c["check"]: c["ok"] for c in report["checks"]} == {
        "vllm": True, "model": True, "attention": True, "weights": True, "profile": False,
    }  # fmt: skip


def test_unknown_flags_are_refused_where_nothing_passes_them_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "p", "--jsno"])
    assert stop.value.code == 2
    assert "--jsno" in capsys.readouterr().err


def test_serve_takes_no_abbreviations() -> None:
    """``--profiler-config`` is vLLM's and must not be read as ``--profile``."""
    args, rest = build_parser().parse_known_args(["serve", "demo", "--profile", "p", "--profiler-config", "x"])
    assert str(args.profile) == "p"
    assert rest == ["--profiler-config", "x"]


def test_layers_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "h.spectral"
    main(["calibrate", "demo", "-o", str(path), "--basis", "hadamard"])
    assert "do not exist" in refused(capsys, "serve", "demo", "--profile", str(path), "--exempt-layers", "30")


def test_help_teaches() -> None:
    result = subprocess.run([sys.executable, "-m", "vllm_spectral.cli.main", "--help"], capture_output=True, check=True)
    assert b"typical use" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A lone % in a help text is an error, and only when it is shown."""
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert f"vllm-spectral {command}" in capsys.readouterr().out


def test_the_demo_model_is_there() -> None:
    from vllm_spectral.models.demo import demo_model

    assert ModelDescription.from_directory(demo_model()).head_dim == 64


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("4096", 4096), ("64M", 64 << 20), ("1.5GiB", 3 << 29), ("2kb", 2048), ("1t", 1 << 40)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    args = build_parser().parse_args(["serve", "demo", "--profile", "p", "--exact-memory-bytes", text])
    assert exact_fields(args)["exact_bytes"] == size


@pytest.mark.parametrize(
    "flag", [["--exact-memory-bytes", "much"], ["--exact-memory-bytes", "-1"], ["--exact-recent-tokens", "-1"]]
)
def test_sizes_that_make_no_sense(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(["serve", "demo", "--profile", "p", *flag])
    assert exit_.value.code == 2
    assert flag[0] in capsys.readouterr().err


def test_the_exact_tier_is_on_by_default() -> None:
    args = build_parser().parse_args(["evaluate", "demo", "--profile", "p", "--text", "t"])
    assert exact_fields(args) == {"exact_first_tokens": 4, "exact_recent_tokens": 64, "exact_bytes": None}


def test_presets_need_no_engine_where_nothing_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "instant.spectral"
    assert main(["calibrate", "demo", "-o", str(path), "--preset", "instant"]) == 0
    made = load_profile(path)
    assert (made.provenance.basis, made.bits_per_element) == ("hadamard", 4.0)
    assert main(["calibrate", "demo", "-o", str(path), "--preset", "instant", "--bits", "3"]) == 0
    assert load_profile(path).bits_per_element == 3.0


def test_evaluate_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, text = tmp_path / "p.spectral", tmp_path / "t.txt"
    assert main(["calibrate", "demo", "-o", str(path), "--preset", "instant"]) == 0
    text.write_text("word " * 100)
    command = ["evaluate", "demo", "--profile", str(path), "--text", str(text)]
    assert "unknown cache 'int3'" in refused(capsys, *command, "--against", "int3")
    assert "--context" in refused(capsys, *command, "--context", "9000")
    assert "--exempt-layers [30]" in refused(capsys, *command, "--exempt-layers", "30")
    assert "cannot write" in refused(capsys, *command, "--markdown", str(tmp_path / "none" / "t.md"))
    twice = ["evaluate", "demo", "--profile", str(path), str(path), "--text", str(text)]
    assert "two caches have the name p" in refused(capsys, *twice)


def test_serve_recommends_exempt_layers_and_takes_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.spectral"
    assert main(["calibrate", "demo", "-o", str(path), "--preset", "instant"]) == 0
    monkeypatch.setattr(
        "vllm_spectral.models.biases.survey", lambda _: BiasSurvey((KeyBias(0, 90.0, 1.0), KeyBias(7, 50.0, 1.0)))
    )
    served = []
    monkeypatch.setattr("vllm_spectral_server.launch.serve", lambda *args: served.append(args[3]))
    assert main(["serve", "demo", "--profile", str(path), "--exempt-layers", "7"]) == 0
    assert "warning: key biases of layers 0 are too large" in capsys.readouterr().err
    assert served[0].exempt_layers == {7}
