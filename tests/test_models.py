"""What a model directory says about itself, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vllm_spectral.errors import SpectralError, UnsupportedModelError
from vllm_spectral.models import demo
from vllm_spectral.models.demo import resolve_model
from vllm_spectral.models.description import ModelDescription

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 2048,
}


def model(path: Path, **changes: Any) -> ModelDescription:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return ModelDescription.from_directory(path)


def test_geometry(tmp_path: Path) -> None:
    found = model(tmp_path)
    assert (found.num_layers, found.num_query_heads, found.num_kv_heads, found.head_dim) == (2, 8, 2, 64)
    assert found.kv_elements_per_token == 2 * 2 * 2 * 64
    found.require_supported()
    assert model(tmp_path, text_config=CONFIG | {"head_dim": 128}).head_dim == 128


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 48}, "head_dim 48"),
        ({"head_dim": 512}, "head_dim 512"),
        ({"kv_lora_rank": 512}, "latent"),
        ({"sliding_window": 4096}, "sliding-window"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"attn_logit_softcapping": 50.0}, "soft-capping"),
        ({"model_type": "bloom"}, "ALiBi"),
        ({"model_type": "gpt_oss"}, "sinks"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"num_key_value_heads": 3}, "multiple"),
    ],
)
def test_unsupported_attention_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        model(tmp_path, **changes).require_supported()


def test_a_window_that_is_switched_off_is_fine(tmp_path: Path) -> None:
    model(tmp_path, sliding_window=4096, use_sliding_window=False).require_supported()


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_broken_configuration(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError):
        ModelDescription.from_directory(tmp_path)


def test_the_fingerprint_sees_other_weights_and_ignores_the_path(tmp_path: Path) -> None:
    prints = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        directory = tmp_path / name
        directory.mkdir()
        weights = torch.randn(600, 600, generator=torch.Generator().manual_seed(seed))
        save_file({"w": weights}, directory / "model.safetensors")
        prints.append(model(directory).fingerprint())
    assert prints[0] == prints[1]
    assert prints[0].differences(prints[2])


def test_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        model(tmp_path).fingerprint()


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nothing/here", "a/b/c"])
def test_a_model_that_does_not_exist(name: str) -> None:
    with pytest.raises(SpectralError, match="no such model"):
        resolve_model(name)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_full_disk_is_said_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writers of tokenizers and weights raise no OSError."""

    def convert(_source: Path, target: Path, _progress: bool) -> None:
        (target / "half").write_text("x")
        raise error

    monkeypatch.setenv("VLLM_SPECTRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_convert", convert)
    with pytest.raises(SpectralError, match=r"No space left on device.*VLLM_SPECTRAL_CACHE"):
        demo.demo_model(progress=False)
    assert list(tmp_path.iterdir()) == []


def test_whoever_may_enter_the_cache_may_read_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(_source: Path, target: Path, _progress: bool) -> None:
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").touch(0o600)

    monkeypatch.setenv("VLLM_SPECTRAL_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "_convert", convert)
    made = demo.demo_model(progress=False)
    assert {oct(file.stat().st_mode & 0o777) for file in made.iterdir()} == {"0o644"}
