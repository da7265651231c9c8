"""A tiny random Llama and a profile for it, for what needs a real engine but no real model."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu.models import Shape, random_model
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
    layers = 2
    shape = Shape(heads * DIM, 512, layers, heads, kv_heads, DIM, VOCABULARY, 2048, "float32")
    random_model(directory, shape)
    moments = LayerMoments(kv_heads, DIM)
    vectors = correlated(3000, seed=0, heads=kv_heads)
    query = torch.randn(3000, heads, DIM, generator=torch.Generator().manual_seed(0))
    moments.add(query, vectors, vectors, torch.arange(3000))
    profile = Profile(
        "tiny", ModelDescription.from_directory(directory).fingerprint(), slot_bytes, Codebooks(normal_codebooks()),
        tuple(spectral_layer(moments, slot_bytes) for _ in range(layers)),
        Provenance("spectral", slot_bytes * 4 / DIM, "", 3000, 0, "", {}),
    )  # fmt: skip
    path = directory / "tiny.spectral"
    save_profile(profile, path)
    return path
