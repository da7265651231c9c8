"""The command that tells what a model needs, and the table of well-known models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.models.test_biases import CONFIG, layer, write
from vllm_spectral.cli import doctor
from vllm_spectral.cli.main import main
from vllm_spectral.models.decoder import Decoder
from vllm_spectral.models.examples import EXAMPLES, RUN, table
from vllm_spectral.models.known import RUN_TYPES
from vllm_spectral.models.support import Verdict, assess

DOCS = Path(__file__).parents[2] / "docs" / "models.md"


def report(capsys: pytest.CaptureFixture[str], path: Path, code: int) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["doctor", str(path), "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"model", "servable", "checks", "verdict", "reasons", "notes", "exempt_layers", "key_biases"} == set(found)
    assert found["servable"] is (code == 0)
    return found


def test_exempt_layers_are_recommended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, layer(0, 200.0) | layer(1, 3.0) | layer(2, 3.0) | layer(3, 300.0))
    found = report(capsys, tmp_path, 0)
    assert found["verdict"] == "supported_with_exempt_layers"
    assert found["exempt_layers"] == [0, 3]
    assert [bias["layer"] for bias in found["key_biases"]] == [0, 1, 2, 3]
    assert found["key_biases"][0]["ratio"] > found["key_biases"][1]["ratio"]
    assert main(["doctor", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.rstrip().endswith("better with --exempt-layers 0 3")
    assert "layer 3: its key bias is" in text


def test_a_supported_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"w": torch.ones(3)}, model_type="llama")
    found = report(capsys, tmp_path, 0)
    assert (found["verdict"], found["reasons"], found["exempt_layers"]) == ("supported", [], [])
    assert main(["doctor", str(tmp_path)]) == 0
    assert "exempt" not in capsys.readouterr().out


@pytest.mark.parametrize("config", [CONFIG | {"kv_lora_rank": 8}, EXAMPLES["Flan-T5-base"], EXAMPLES["OpenELM-270M"]])
def test_a_refused_model(config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    found = report(capsys, tmp_path, 2)
    assert found["verdict"] == "refused"
    assert found["reasons"] == list(assess(Decoder(config)).reasons)
    assert main(["doctor", str(tmp_path)]) == 2
    text = capsys.readouterr().out
    assert text.count(found["reasons"][0]) == 1
    assert "cannot be served" in text


def test_a_model_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, tmp_path, 2)
    assert found["verdict"] == "refused"
    assert "no config.json" in found["reasons"][0]
    (tmp_path / "config.json").write_text('{"model_type": "llava", "text_config": {"model_type": "llama"}}')
    assert "must be written out" in report(capsys, tmp_path, 2)["reasons"][0]


def test_a_gpu_is_new_ground(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"w": torch.ones(3)}, model_type="llama")
    monkeypatch.setattr(doctor, "_on_cuda", lambda: True)
    assert any("not yet run on a GPU" in note for note in report(capsys, tmp_path, 0)["notes"])


def test_doctor_needs_something_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 2
    assert "--table" in capsys.readouterr().err


def test_the_documented_table_is_the_present_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--table"]) == 0
    assert DOCS.read_text() == capsys.readouterr().out == table(), "vllm-spectral doctor --table > docs/models.md"


def test_what_was_run_is_supported() -> None:
    assert RUN & set(EXAMPLES)
    for name in RUN & set(EXAMPLES):
        decoder = Decoder(EXAMPLES[name])
        assert decoder.model_type in RUN_TYPES
        assert assess(decoder).verdict is Verdict.SUPPORTED
