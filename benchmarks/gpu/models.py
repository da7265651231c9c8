"""Models to run vLLM on without a download: shapes with dummy weights, and small ones with weights that mean something."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_spectral.calibration.run import CalibrationRequest, build
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.storage import save_profile


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the defaults are those of Llama-3.1-8B."""

    hidden: int = 4096
    inner: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocabulary: int = 128256
    positions: int = 131072
    dtype: str = "bfloat16"

    def config(self) -> dict[str, object]:
        """What stands in ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim, "vocab_size": self.vocabulary,
            "max_position_embeddings": self.positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
            "tie_word_embeddings": False, "torch_dtype": self.dtype, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip


LLAMA_8B = Shape()
SMALL = Shape(256, 512, 2, 4, 2, 64, 512, 4096, "float32")
"""Small enough to have real weights, which :func:`random_model` makes up."""


def dummy_model(directory: Path, shape: Shape) -> None:
    """A model to be loaded with ``load_format="dummy"``: its weights are a few bytes that only give it an identity."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config()))
    save_file({"dummy": torch.zeros(1)}, directory / "model.safetensors")


def random_model(directory: Path, shape: Shape) -> None:
    """A model with random weights of the size that trained ones have, so that attention is not uniform."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(shape.config()))
    generator = torch.Generator().manual_seed(0)

    def weight(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator) * (2.0 / size[-1]) ** 0.5

    hidden, inner = shape.hidden, shape.inner
    tensors = {
        "model.embed_tokens.weight": weight(shape.vocabulary, hidden) * 16,
        "lm_head.weight": weight(shape.vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden),
    }
    for index in range(shape.layers):
        prefix = f"model.layers.{index}."
        for name, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads), ("v_proj", shape.kv_heads)):
            tensors[f"{prefix}self_attn.{name}.weight"] = weight(heads * shape.head_dim, hidden)
        tensors[f"{prefix}self_attn.o_proj.weight"] = weight(hidden, shape.heads * shape.head_dim)
        tensors[f"{prefix}mlp.gate_proj.weight"] = weight(inner, hidden)
        tensors[f"{prefix}mlp.up_proj.weight"] = weight(inner, hidden)
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(hidden, inner)
        tensors[f"{prefix}input_layernorm.weight"] = torch.ones(hidden)
        tensors[f"{prefix}post_attention_layernorm.weight"] = torch.ones(hidden)
    save_file(tensors, directory / "model.safetensors")


def instant_profile(directory: Path, bits: float) -> Path:
    """A profile that needs no calibration, beside the model: a Hadamard basis, ``bits`` per element."""
    path = directory / f"{bits:g}.spectral"
    request = CalibrationRequest(ModelDescription.from_directory(directory), path.stem, bits, "hadamard")
    save_profile(build(request, None), path)
    return path
