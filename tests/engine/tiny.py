"""A tiny random Llama and a profile for it, for what needs a real engine but no real model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.conftest import DIM, correlated
from vllm_spectral.calibration.allocate import spectral_layer
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.schema import Profile, Provenance
from vllm_spectral.profile.storage import save_profile
from vllm_spectral.stats.moments import LayerMoments

VOCABULARY = 512


def make_tiny(directory: Path, *, heads: int, kv_heads: int, slot_bytes: int) -> Path:
    """Write the model, without a tokenizer.

    Args:
        directory: where to.
        heads, kv_heads: query heads and KV heads, of ``DIM`` channels.
        slot_bytes: of the profile, whose heads all differ, so that a rank with the wrong heads is seen.

    Returns:
        The profile's path.
    """
    hidden, layers, inner = heads * DIM, 2, 512
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": DIM,
        "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (2.0 / shape[-1]) ** 0.5

    tensors = {
        "model.embed_tokens.weight": weight(VOCABULARY, hidden) * 16,
        "lm_head.weight": weight(VOCABULARY, hidden),
    }
    tensors["model.norm.weight"] = torch.ones(hidden)
    for index in range(layers):
        prefix = f"model.layers.{index}."
        for name, rows in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads), ("o_proj", heads)):
            tensors[f"{prefix}self_attn.{name}.weight"] = weight(rows * DIM, hidden)
        tensors[f"{prefix}mlp.gate_proj.weight"] = weight(inner, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = weight(inner, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(hidden, inner)
        tensors[f"{prefix}input_layernorm.weight"] = torch.ones(hidden)
        tensors[f"{prefix}post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file(tensors, directory / "model.safetensors")
    moments = LayerMoments(kv_heads, DIM)
    vectors = correlated(3000, seed=0, heads=kv_heads)
    query = torch.randn(3000, heads, DIM, generator=generator)
    moments.add(query, vectors, vectors, torch.arange(3000))
    profile = Profile(
        "tiny", ModelDescription.from_directory(directory).fingerprint(), slot_bytes, Codebooks(normal_codebooks()),
        tuple(spectral_layer(moments, slot_bytes) for _ in range(layers)),
        Provenance("spectral", slot_bytes * 4 / DIM, "", 3000, 0, "", {}),
    )  # fmt: skip
    path = directory / "tiny.spectral"
    save_profile(profile, path)
    return path
