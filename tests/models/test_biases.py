"""Key biases out of the weights, and when they ask for exempt layers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from vllm_spectral.calibration.allocate import spectral_layer
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.layout import slot_bytes_for
from vllm_spectral.codec.rotation import rotate
from vllm_spectral.models.biases import LIMIT, BiasSurvey, KeyBias, survey, with_biases
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.models.support import KEY_BIAS_NOTE, Support, Verdict
from vllm_spectral.stats.moments import LayerMoments

LAYERS, HEADS, DIM, HIDDEN = 4, 2, 64, 256
CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": HEADS,
    "hidden_size": HIDDEN,
    "max_position_embeddings": 1024,
}


def layer(index: int, peak: float, prefix: str = "model.", dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights of one layer whose keys have a content of root mean square 1 and a bias of ``peak`` in one channel."""
    draw = torch.Generator().manual_seed(index)
    bias = torch.zeros(HEADS * DIM)
    bias[5] = peak
    name = f"{prefix}layers.{index}."
    return {
        f"{name}self_attn.k_proj.bias": bias.to(dtype),
        f"{name}self_attn.k_proj.weight": (torch.randn(HEADS * DIM, HIDDEN, generator=draw) / 8).to(dtype),
        f"{name}input_layernorm.weight": torch.full((HIDDEN,), 0.5, dtype=dtype),
    }


def write(path: Path, *shards: dict[str, Tensor], **changes: Any) -> ModelDescription:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    for index, tensors in enumerate(shards):
        save_file(tensors, path / f"model-{index}.safetensors")
    return ModelDescription.from_directory(path)


def judged(model: ModelDescription) -> Support:
    return with_biases(model.support, survey(model), model.num_layers)


def test_only_layers_with_a_huge_bias_are_exempt(tmp_path: Path) -> None:
    model = write(tmp_path, layer(0, 200.0) | layer(1, 3.0), layer(2, 0.0) | layer(3, -300.0))
    found = survey(model)
    assert found.exempt_layers == (0, 3)
    assert [round(bias.peak) for bias in found.layers] == [200, 3, 0, 300]
    assert found.layers[1].ratio == pytest.approx(3.0, rel=0.1)  # sixteen rows of a random matrix
    support = judged(model)
    assert support.verdict is Verdict.SUPPORTED_WITH_EXEMPT_LAYERS
    assert support.exempt_layers == (0, 3)
    assert ["layer 0:" in support.reasons[0], "layer 3:" in support.reasons[1]] == [True, True]
    assert any("2 layers are within" in note for note in support.notes)


def test_the_spread_is_what_keys_show(tmp_path: Path) -> None:
    """Keys of normed random states have the root mean square that the weights promise."""
    tensors = layer(0, 0.0, dtype=torch.float32)
    gain = torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.5
    tensors["model.layers.0.input_layernorm.weight"] = gain
    states = torch.randn(2000, HIDDEN, generator=torch.Generator().manual_seed(2))
    keys = (states * gain) @ tensors["model.layers.0.self_attn.k_proj.weight"].T
    expected = keys.view(-1, HEADS, DIM).square().mean(dim=(0, 2)).sqrt()
    (found,) = survey(write(tmp_path, tensors)).layers
    assert found.spread is not None
    # The worst head is any of the two here; sixteen rows stand for sixty-four.
    assert min(abs(found.spread / float(value) - 1) for value in expected) < 0.1


@given(st.floats(0.01, 100.0))
def test_the_ratio_has_no_unit(tmp_path_factory: pytest.TempPathFactory, factor: float) -> None:
    tensors = layer(0, 7.0, dtype=torch.float32)
    scaled = {name: t * factor if "k_proj" in name else t for name, t in tensors.items()}
    ratios = []
    for content in (tensors, scaled):
        ratios += [bias.ratio for bias in survey(write(tmp_path_factory.mktemp("model"), content)).layers]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def test_the_bias_of_a_norm_counts(tmp_path: Path) -> None:
    tensors = layer(0, 0.0, dtype=torch.float32)
    row = tensors["model.layers.0.self_attn.k_proj.weight"][0]
    tensors["model.layers.0.input_layernorm.bias"] = row * (100 / row.square().sum())
    (found,) = survey(write(tmp_path, tensors)).layers
    assert found.peak == pytest.approx(100, rel=0.1)


def test_towers_and_drafts_are_not_the_decoder(tmp_path: Path) -> None:
    tensors = layer(0, 1.0, prefix="language_model.model.")
    tensors |= layer(1, 900.0, prefix="vision_tower.encoder.") | layer(2, 900.0, prefix="mtp.")
    assert [bias.layer for bias in survey(write(tmp_path, tensors)).layers] == [0]


def test_layers_and_shapes_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    odd = {"model.layers.1.self_attn.k_proj.bias": torch.ones(7)}
    assert [bias.layer for bias in survey(write(tmp_path, layer(0, 1.0) | layer(9, 1.0) | odd)).layers] == [0]


def test_no_biases(tmp_path: Path) -> None:
    model = write(tmp_path, {"model.layers.0.self_attn.k_proj.weight": torch.ones(HEADS * DIM, HIDDEN)})
    assert survey(model) == BiasSurvey(())
    support = judged(model)
    assert support.verdict is Verdict.SUPPORTED
    assert KEY_BIAS_NOTE in model.support.notes
    assert KEY_BIAS_NOTE not in support.notes


def unread(model: ModelDescription) -> str:
    support = judged(model)
    assert support.verdict is Verdict.SUPPORTED
    assert not support.exempt_layers
    (note,) = [note for note in support.notes if "not judged" in note]
    return note


def test_biases_that_cannot_be_judged_are_said(tmp_path: Path) -> None:
    assert "no *.safetensors" in unread(write(tmp_path / "none"))
    quantized = layer(0, 500.0)
    quantized["model.layers.0.self_attn.k_proj.weight"] = torch.ones(HEADS * DIM, HIDDEN, dtype=torch.int8)
    assert "500 (layer 0)" in unread(write(tmp_path / "quantized", quantized))
    nameless = {name: t for name, t in layer(0, 500.0).items() if "norm" not in name}
    assert "500 (layer 0)" in unread(write(tmp_path / "nameless", nameless))
    fused = {"transformer.h.0.attn.c_attn.bias": torch.ones(3)}
    assert "c_attn.bias" in unread(write(tmp_path / "fused", fused))
    damaged = write(tmp_path / "damaged", layer(0, 1.0))
    (damaged.path / "model-0.safetensors").write_bytes(b"\0" * 20)
    assert "cannot be read" in unread(damaged)


def test_a_refusal_stays_a_refusal() -> None:
    refusal = Support(Verdict.REFUSED, ("no",))
    assert with_biases(refusal, BiasSurvey((KeyBias(0, 900.0, 1.0),)), 4) is refusal


def test_a_model_of_exempt_layers_alone() -> None:
    support = with_biases(Support(Verdict.SUPPORTED), BiasSurvey((KeyBias(0, 900.0, 1.0),)), 1)
    assert any("nothing would be compressed" in note for note in support.notes)


def test_the_limit_is_where_the_codec_feels_the_bias() -> None:
    """Attention scores at 4 bits: little is lost at the limit, much at eight times the limit."""
    plain, limit, beyond = (score_error(ratio) for ratio in (0.0, LIMIT, 8 * LIMIT))
    # At the limit a biased channel has the error of any other: sqrt(2) in total if queries weigh both parts alike.
    assert limit < 1.5 * plain
    assert beyond > 2 * plain


def score_error(ratio: float, num_tokens: int = 1500, dim: int = 64) -> float:
    """Root mean square error of attention scores of keys whose bias is ``ratio`` times their content in three planes."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q * torch.logspace(0.3, -1.0, dim)
    mixing /= mixing.square().sum(dim=1).mean().sqrt()
    angle = torch.arange(num_tokens)[:, None] * 1e4 ** (-torch.arange(dim // 2) / (dim / 2))

    def turned(bias: Tensor) -> Tensor:
        x = torch.randn(num_tokens, dim, generator=draw) @ mixing.T + bias
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)

    bias = torch.zeros(dim)
    bias[[3, 12, 25]] = math.sqrt(2)
    keys, queries = turned(ratio * bias), turned(bias)
    moments = LayerMoments(1, dim)
    moments.add(queries[:, None], keys[:, None], turned(torch.zeros(dim))[:, None], torch.arange(num_tokens))
    slot_bytes = slot_bytes_for(4.0, dim)
    profile = spectral_layer(moments, slot_bytes)
    codec = profile.codec(slot_bytes, Codebooks(normal_codebooks()))
    restored = codec.decode_keys(codec.encode(keys[:, None], keys[:, None]))[:, 0]
    error = rotate(queries[:, None], profile.key_basis)[:, 0] @ restored.T - queries @ keys.T
    return float(error.square().mean().sqrt())
