"""The engine benchmark for GPUs, as far as it goes without one; what it tells vLLM on CUDA is tested in tests/cuda."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.engine import (
    GATE_TOLERANCE,
    ON_THE_CPU,
    SPECTRAL,
    STOCK,
    arguments_of,
    capture_sizes,
    in_a_process,
    lines,
    main,
    parser,
)
from benchmarks.gpu.models import LLAMA_8B, SMALL, dummy_model
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.storage import load_profile, require_model


def test_by_default_it_does_what_is_asked_for() -> None:
    args = parser().parse_args([])
    assert args.contexts == [8192, 32768] and args.fit_context == 16384 and len(args.batches) > 1
    assert set(args.kinds) == {*STOCK, *SPECTRAL}


def test_the_dummy_model_has_the_shape_and_a_profile_of_its_own(tmp_path: Path) -> None:
    dummy_model(tmp_path, LLAMA_8B)
    model = ModelDescription.from_directory(tmp_path)
    model.require_supported()
    assert (model.num_layers, model.num_query_heads, model.num_kv_heads, model.head_dim) == (32, 32, 8, 128)
    small = tmp_path / "small"
    dummy_model(small, SMALL)
    for kind, bits in (("quality", 4), ("balanced", 3), ("compact", 2)):
        arguments = arguments_of(kind, small, cuda=True)
        spectral = arguments["additional_config"]["spectral"]
        profile = load_profile(Path(spectral["profile"]))
        require_model(profile, ModelDescription.from_directory(small).fingerprint(), Path(spectral["profile"]))
        assert profile.bits_per_element == bits and spectral["allow_unproven_device"]


def test_graphs_are_captured_for_what_is_timed() -> None:
    assert capture_sizes([1, 8, 40], 64) == [1, 8, 16, 32, 40, 48, 64]


def test_more_at_once_than_allowed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--most", "4", "--batches", "8"])
    assert "--most 4 is less" in capsys.readouterr().err


def test_a_kind_that_fails_or_hangs_is_a_result(tmp_path: Path) -> None:
    task: dict[str, Any] = {"kind": "quality", "model": str(tmp_path), "gate": True}
    assert "not done after 0.1 s" in in_a_process(task, 0.1)["failed"]
    failed = lines({"kind": "fp8", "failed": "1", "log": "a\nb\nthe reason"}, {})
    assert failed[0] == "  failed: 1" and "the reason" in failed[-1]


@pytest.mark.slow
def test_it_runs_on_the_cpu_too(tmp_path: Path) -> None:
    """The whole program, with vLLM's CPU attention and our native kernels in the place of the GPU's."""
    path = tmp_path / "result.json"
    flags = [
        "--small",
        "--kinds",
        ON_THE_CPU[0],
        "balanced",
        "--contexts",
        "64",
        "--batches",
        "1",
        "2",
        "--fit-context",
        "512",
    ]
    assert not main(
        [*flags, "--most", "8", "--kv-gib", "0.004", "--chunk", "256", "--minutes", "3", "--json", str(path)]
    )
    found = json.loads(path.read_text())
    assert 0 < found["gate"]["against_bf16"] < GATE_TOLERANCE
    stock, ours = found["kinds"]
    assert ours["capacity_tokens"] > 5 * stock["capacity_tokens"]
    assert ours["requests_that_fit"] > stock["requests_that_fit"] > 0
    assert all(entry["steps"] > 40 and not entry["preemptions"] for kind in (stock, ours) for entry in kind["decode"])
