"""What is refused, what is supported, and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_spectral.models.decoder import Decoder
from vllm_spectral.models.known import READ_TYPES, RUN_TYPES, SUPPORTED_HEAD_DIMS
from vllm_spectral.models.rules import RULES, UNKNOWN
from vllm_spectral.models.support import Support, Verdict, assess

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 512,
    "max_position_embeddings": 8192,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def verdict(**changes: Any) -> Support:
    return assess(Decoder(CONFIG | changes))


def refused(**changes: Any) -> str:
    support = verdict(**changes)
    assert support.verdict is Verdict.REFUSED
    assert support.reasons
    assert not support.exempt_layers
    return "; ".join(support.reasons)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_encoder_decoder": True}, ["is_encoder_decoder", "encoder-decoder"]),
        ({"cross_attention_layers": [1, 3]}, ["cross_attention_layers"]),
        ({"model_type": "jamba", "attn_layer_period": 8}, ["attn_layer_period", "state-space"]),
        ({"model_type": "mamba2"}, ["mamba2", "state-space"]),
        ({"mamba_n_heads": 24}, ["mamba_n_heads", "state-space"]),
        ({"linear_num_key_heads": 16}, ["linear attention"]),
        ({"layer_types": [FULL, "linear_attention"]}, ["linear_attention"]),
        ({"layer_types": ["conv", FULL]}, ["layers of type conv"]),
        ({"layers_block_type": ["mamba", "attention"]}, ["mamba"]),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64, "v_head_dim": 128}, ["kv_lora_rank 512", "latent"]),
        ({"index_topk": 2048}, ["sparse"]),
        ({"sliding_window": 4096}, ["sliding_window 4096", "max_position_embeddings to the window"]),
        ({"sliding_window": 8192}, ["never acts"]),
        ({"sliding_window": 9999, "use_sliding_window": True}, ["never acts"]),
        ({"sliding_window": 128, "layer_types": [SLIDING] * 4}, ["sliding_window 128:"]),
        ({"sliding_window": 128, "layer_types": [SLIDING, FULL] * 2}, ["128 in 2 of 4 layers"]),
        ({"layer_types": [SLIDING] * 4}, ["layers of type sliding_attention"]),
        ({"model_type": "gemma3_text", "sliding_window": 512}, ["sliding_window_pattern 6"]),
        ({"model_type": "mistral"}, ["sliding_window 4096"]),
        ({"attention_chunk_size": 8192}, ["attention_chunk_size 8192", "chunks"]),
        ({"dual_chunk_attention_config": {"chunk_size": 9}}, ["dual chunk"]),
        ({"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping 50.0", "soft-capping"]),
        ({"model_type": "bloom"}, ["bloom", "ALiBi"]),
        ({"attn_config": {"alibi": True}}, ["attn_config.alibi"]),
        ({"position_embedding_type": "alibi"}, ["ALiBi"]),
        ({"relative_attention_num_buckets": 32}, ["biases on attention scores"]),
        ({"position_embedding_type": "relative_key"}, ["relative_key"]),
        ({"model_type": "gpt_oss"}, ["gpt_oss", "sinks"]),
        ({"model_type": "granite", "layer_types": [FULL] * 4}, ["granite", "sinks"]),
        ({"num_kv_shared_layers": 2}, ["num_kv_shared_layers 2", "share"]),
        ({"use_cla": True, "cla_share_factor": 2}, ["cla_share_factor 2"]),
        ({"loop_num": 2}, ["loop_num"]),
        ({"model_type": "diffllama"}, ["differential"]),
        ({"block_configs": [{"attention": {}}]}, ["block_configs", "agree"]),
        ({"num_key_value_heads": [2, 4]}, ["num_key_value_heads is a list"]),
        ({"global_head_dim": 512}, ["global_head_dim 512"]),
        ({"v_head_dim": 32}, ["v_head_dim 32 with head_dim 64"]),
        ({"is_causal": False}, ["is_causal"]),
        ({"model_type": "camembert", "type_vocab_size": 1}, ["camembert", "later ones"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"head_dim": 48}, ["head_dim 48"]),
        ({"num_key_value_heads": 3}, ["multiple"]),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, ["kv_cache_scheme", "kv_cache_dtype"]),
        ({"quantization_config": {"quantization": {"kv_cache_quant_algo": "FP8"}}}, ["kv_cache_quant_algo"]),
    ],
)  # fmt: skip
def test_an_obstacle_is_named_with_its_field(changes: dict[str, Any], words: list[str]) -> None:
    message = refused(**changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False},
        {"model_type": "qwen2", "sliding_window": 4096},  # Qwen2 means no window unless it says so
        {"model_type": "mistral", "sliding_window": None},
        {"sliding_window": 0},
        {"sliding_window": 4096, "layer_types": [FULL] * 4},
        {"model_type": "exaone4", "sliding_window": None, "sliding_window_pattern": None},
        {"model_type": "granitemoehybrid", "layer_types": ["attention"] * 4, "mamba_n_heads": 48},
        {"model_type": "hunyuan_v1_dense", "use_cla": False, "cla_share_factor": 2},
        {"v_head_dim": 64},
        {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "awq"}},
        {"num_key_value_heads": 1},
    ],
)
def test_what_only_looks_like_an_obstacle(changes: dict[str, Any]) -> None:
    support = verdict(**changes)
    assert support.verdict is Verdict.SUPPORTED, support.reasons
    assert not support.reasons


def test_every_obstacle_is_reported_at_once() -> None:
    message = refused(model_type="gemma2", num_key_value_heads=3)
    assert all(word in message for word in ("sliding_window", "soft-capping", "multiple"))


def test_an_obstacle_of_the_model_around_the_decoder() -> None:
    outer = {"model_type": "paligemma", "text_config": CONFIG | {"model_type": "gemma"}}
    assert "paligemma" in "; ".join(assess(Decoder(outer)).reasons)
    outer = {"model_type": "llava", "text_config": CONFIG}
    assert any("text_config was judged" in note for note in assess(Decoder(outer)).notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "was run, with"),
        ({"model_type": "qwen3"}, "never run here"),
        ({"model_type": "brand_new"}, "not known here and was never run"),
        ({"sliding_window": 4096, "use_sliding_window": False}, "acts in no layer"),
        ({"model_type": "phi", "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.25}, "rotary_pct 0.25"),
        ({"model_type": "glm", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"model_type": "granite", "attention_multiplier": 0.0078125}, "attention_multiplier"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"model_type": "qwen2"}, "keys have biases"),
        ({"attention_bias": True}, "keys have biases"),
    ],
)  # fmt: skip
def test_notes(changes: dict[str, Any], words: str) -> None:
    assert any(words in note for note in verdict(**changes).notes)


@pytest.mark.parametrize(
    "field",
    ["retention_attention_decay", "landmark_window", "kv_merge_ratio", "share_every", "memory_slots", "diff_heads"],
)
def test_an_unknown_type_with_an_unknown_kind_of_attention(field: str) -> None:
    assert field in refused(model_type="brand_new", **{field: 3})
    assert verdict(model_type="brand_new", **{field: None}).verdict is Verdict.SUPPORTED
    # vLLM's code for a known type was read: what it does not look at changes nothing.
    assert verdict(model_type="qwen3", **{field: 3}).verdict is Verdict.SUPPORTED


def test_harmless_fields_of_an_unknown_type() -> None:
    fields = {
        "attention_bias": True, "attention_dropout": 0.1, "attn_implementation": "sdpa", "use_cache": True, "num_experts": 8,
        "num_shared_experts": 2, "decoder_sparse_step": 1, "rope_theta": 1e6, "tie_word_embeddings": True, "qkv_bias": True,
        "embedding_multiplier": 12.0, "num_local_experts": 4, "router_aux_loss_coef": 0.1, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    assert verdict(model_type="brand_new", **fields).verdict is Verdict.SUPPORTED


@given(
    st.integers(1, 100), st.integers(1, 16), st.integers(1, 16), st.sampled_from(SUPPORTED_HEAD_DIMS),
    st.sampled_from(sorted(READ_TYPES - {"mistral", "exaone4", "falcon", "gpt_bigcode"})),
)  # fmt: skip
def test_any_size_of_a_plain_decoder(layers: int, kv_heads: int, group: int, head_dim: int, kind: str) -> None:
    support = verdict(
        model_type=kind, num_hidden_layers=layers, num_attention_heads=kv_heads * group, num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )  # fmt: skip
    assert support.verdict is Verdict.SUPPORTED


@given(
    st.dictionaries(
        st.text(max_size=12), st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.text()))
    )
)
def test_no_configuration_breaks_the_rules(config: dict[str, Any]) -> None:
    fields = sorted({field for rule in RULES for field in rule.fields})
    for value in (*config.values(), {}, {"alibi": 1}, [[1]]):
        assess(Decoder(config | dict.fromkeys(fields, value)))
        assess(
            Decoder(CONFIG | dict.fromkeys(("layer_types", "attn_config", "architectures", "sliding_window"), value))
        )


def test_the_rules_have_names_of_their_own() -> None:
    names = [rule.name for rule in (*RULES, UNKNOWN)]
    assert len(set(names)) == len(names)
    assert not READ_TYPES & set(RUN_TYPES)
    assert not READ_TYPES & {kind for rule in RULES for kind in rule.types}
