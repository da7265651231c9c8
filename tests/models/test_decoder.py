"""Where a configuration hides its decoder, and what its silence means."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_spectral.models.decoder import ABSENT, Decoder, Geometry
from vllm_spectral.models.known import READ_TYPES
from vllm_spectral.models.rules import RULES

STATED = (
    "num_hidden_layers",
    "n_layer",
    "num_attention_heads",
    "n_head",
    "hidden_size",
    "n_embd",
    "max_position_embeddings",
)
PLAIN = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PLAIN | {"max_position_embeddings": 99}, Geometry(2, 8, 2, 64, 99)),
        (PLAIN | {"head_dim": 128}, Geometry(2, 8, 2, 128, 0)),
        (PLAIN | {"head_dim": None, "num_key_value_heads": None}, Geometry(2, 8, 8, 64, 0)),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, Geometry(12, 12, 12, 64, 1024)),
        ({"model_type": "gpt_bigcode", "n_layer": 4, "n_head": 16, "n_embd": 2048}, Geometry(4, 16, 1, 128, 0)),
        ({"model_type": "falcon", "n_layer": 2, "n_head": 71, "hidden_size": 4544}, Geometry(2, 71, 1, 64, 0)),
        (
            {"model_type": "falcon", "n_layer": 2, "n_head": 128, "hidden_size": 8192, "num_kv_heads": 8}
            | {"new_decoder_architecture": True},
            Geometry(2, 128, 8, 64, 0),
        ),
        (
            {"n_layers": 40, "n_heads": 48, "d_model": 6144, "max_seq_len": 32768, "attn_config": {"kv_n_heads": 8}},
            Geometry(40, 48, 8, 128, 32768),
        ),
        (
            {"num_layers": 28, "num_attention_heads": 32, "hidden_size": 4096, "kv_channels": 128, "seq_length": 8192}
            | {"multi_query_group_num": 2},
            Geometry(28, 32, 2, 128, 8192),
        ),
    ],
)
def test_sizes_under_every_name(config: dict[str, Any], expected: Geometry) -> None:
    assert Decoder(config).geometry() == expected


@pytest.mark.parametrize("section", ["text_config", "llm_config", "language_config"])
def test_a_decoder_inside_a_larger_model(section: str) -> None:
    found = Decoder(
        {"model_type": "outer", "vision_config": {"num_hidden_layers": 9}, section: PLAIN | {"model_type": "inner"}}
    )
    assert found.geometry().num_layers == 2
    assert (found.section, found.model_type) == (section, "inner")
    assert found.model_types == {"inner", "outer"}


def test_a_decoder_two_levels_down() -> None:
    assert Decoder({"thinker_config": {"text_config": PLAIN}}).section == "thinker_config.text_config"


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": None}, {"num_attention_heads": 0}, {"num_key_value_heads": [1, 2]}, {"hidden_size": "x"}],
)
def test_sizes_that_are_not_stated(changes: dict[str, Any]) -> None:
    with pytest.raises((LookupError, TypeError, ValueError)):
        Decoder(PLAIN | changes).geometry()


def test_a_stated_null_is_no_absence() -> None:
    assert Decoder({"model_type": "mistral"}).get("sliding_window") == 4096
    assert Decoder({"model_type": "mistral", "sliding_window": None}).get("sliding_window") is None


def test_what_is_absent_means_what_the_library_fills_in() -> None:
    """The rules find the same in a silent ``config.json`` as in the configuration that Transformers makes of it."""
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    compared = set()
    for kind in sorted((READ_TYPES | set(ABSENT)) & set(auto.CONFIG_MAPPING_NAMES)):
        filled = auto.CONFIG_MAPPING[kind]().to_dict()
        filled = filled.get("text_config", filled)
        # Granite's hybrids always list their layers, and DBRX states its sizes under other names.
        if kind in ("granitemoehybrid", "dbrx"):
            continue
        silent = {"model_type": kind} | {name: filled[name] for name in STATED if name in filled}
        assert found(silent) == found(filled), kind
        compared.add(kind)
    assert len(compared) > 40
    asked_for = auto.CONFIG_MAPPING["qwen2"](use_sliding_window=True)
    assert asked_for.sliding_window == ABSENT["qwen2"]["sliding_window"]


def found(config: dict[str, Any]) -> set[str]:
    """Names of the rules that apply; default sizes are arbitrary."""
    return {rule.name for rule in RULES if rule.applies(Decoder(config))} - {"head size"}
