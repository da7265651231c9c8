"""The attention geometry and identity of a model, read from its directory without loading it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_spectral.errors import UnsupportedModelError

SUPPORTED_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Head sizes that stock vLLM's paged CPU attention takes as well, so that exempt layers always have a kernel."""
_SAMPLE_BYTES = 1 << 16
_SAMPLES_PER_FILE = 16


@dataclass(frozen=True)
class ModelFingerprint:
    """What a profile remembers of its model; two models with equal fingerprints share a profile."""

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    weights: str
    """Hex digest over every weight file's size, header and evenly spaced samples of its bytes."""

    def differences(self, other: ModelFingerprint) -> list[str]:
        """Human-readable list of the fields in which ``other`` differs."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{name} {mine[name]} != {theirs[name]}" for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class ModelDescription:
    """Attention geometry of a decoder, and what keeps it from being served, if anything."""

    path: Path
    model_type: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    obstacles: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model_type} in {self.path}"

    @classmethod
    def from_directory(cls, path: Path) -> ModelDescription:
        """Read ``config.json``.

        Raises:
            UnsupportedModelError: if the directory holds no readable decoder configuration.
        """
        file = path / "config.json"
        try:
            config = json.loads(file.read_text())
        except FileNotFoundError:
            raise UnsupportedModelError(f"{path} is not a model directory: it has no config.json") from None
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"cannot read {file}: {error}") from None
        try:
            config = config.get("text_config", config)
            query_heads = int(config["num_attention_heads"])
            return cls(
                path=path,
                model_type=str(config.get("model_type", "unknown")),
                num_layers=int(config["num_hidden_layers"]),
                num_query_heads=query_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or query_heads),
                head_dim=int(config.get("head_dim") or config["hidden_size"] // query_heads),
                max_positions=int(config.get("max_position_embeddings", 0)),
                obstacles=tuple(_obstacles(config)),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UnsupportedModelError(f"{file} does not describe a decoder with attention heads ({error})") from None

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the cache, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def require_supported(self) -> None:
        """Raise :class:`UnsupportedModelError`, naming every obstacle, unless the model can be served."""
        if self.obstacles:
            raise UnsupportedModelError(
                f"{self.path} cannot be served from spectral pages: " + "; ".join(self.obstacles)
            )

    def fingerprint(self) -> ModelFingerprint:
        """Identity of the model. Reads about 1 MiB per weight file.

        Raises:
            UnsupportedModelError: if there are no safetensors weights.
        """
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UnsupportedModelError(f"{self.path} has no *.safetensors weights; convert the model to safetensors")
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size};".encode())
            with file.open("rb") as stream:
                header = int.from_bytes(stream.read(8), "little")
                digest.update(stream.read(min(header, size)))
                for sample in range(_SAMPLES_PER_FILE):
                    stream.seek(size * sample // _SAMPLES_PER_FILE)
                    digest.update(stream.read(_SAMPLE_BYTES))
        return ModelFingerprint(
            self.model_type, self.num_layers, self.num_kv_heads, self.head_dim, digest.hexdigest()[:32]
        )


def _obstacles(config: dict[str, Any]) -> list[str]:
    """Why a model with this text configuration cannot be served; empty if it can."""
    found: list[str] = []
    query_heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or config["hidden_size"] // query_heads)
    if head_dim not in SUPPORTED_HEAD_DIMS:
        supported = ", ".join(map(str, SUPPORTED_HEAD_DIMS))
        found.append(f"head_dim {head_dim} is not supported (supported: {supported})")
    if query_heads % int(config.get("num_key_value_heads") or query_heads):
        found.append("query heads are not a multiple of KV heads")
    if config.get("kv_lora_rank"):
        found.append("multi-head latent attention is not supported: its cache is compressed already")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        found.append("sliding-window attention is not supported")
    other = sorted(set(config.get("layer_types") or []) - {"full_attention"})
    if other:
        found.append(f"layers of type {', '.join(other)} are not supported, only full_attention")
    if config.get("attn_logit_softcapping"):
        found.append("attention logit soft-capping is not supported")
    if config.get("alibi") or config.get("model_type") in ("bloom", "mpt"):
        found.append("ALiBi position biases are not supported")
    if config.get("model_type") == "gpt_oss":
        found.append("learned attention sinks are not supported")
    if config.get("is_encoder_decoder"):
        found.append("encoder-decoder attention is not supported")
    return found
