"""A model's ``config.json`` as one decoder: where its fields hide, what they are called, what an absent one means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_spectral.errors import UnsupportedModelError

WRAPPERS = (("text_config",), ("llm_config",), ("language_config",), ("thinker_config", "text_config"))
"""Where models of several modalities keep the configuration of their decoder."""

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed")
HEAD_DIM = ("head_dim", "kv_channels")
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""Names of one quantity, in the order in which they count."""

_NO_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_LATENT = {"kv_lora_rank": 512}
_GEMMA4 = {"sliding_window": 512, "sliding_window_pattern": 6, "global_head_dim": 512}
_GEMMA2 = {"sliding_window": 4096, "sliding_window_pattern": 2, "attn_logit_softcapping": 50.0}
ABSENT: dict[str, dict[str, Any]] = {
    "afmoe": {"sliding_window": 1024, "sliding_window_pattern": 4},
    "axk1": _LATENT,
    "cohere2": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "cohere2_moe": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "cwm": {"sliding_window": 8192, "sliding_window_pattern": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "exaone4": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "exaone_moe": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "falcon": {"multi_query": True},
    "gemma2": _GEMMA2,
    "gemma3_text": {"sliding_window": 4096, "sliding_window_pattern": 6},
    "gemma3n_text": {"sliding_window": 512, "sliding_window_pattern": 5, "num_kv_shared_layers": 15},
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4 | {"sliding_window": 1024, "use_bidirectional_attention": "vision"},
    "glm4_moe_lite": _LATENT,
    "gpt_bigcode": {"multi_query": True},
    "gpt_oss": {"sliding_window": 128, "sliding_window_pattern": 2},
    "granite_swa": {"sliding_window": 128, "sliding_window_pattern": 4},
    "llama4_text": {"attention_chunk_size": 8192},
    "longcat_flash": _LATENT,
    "minicpm3": {"kv_lora_rank": 256},
    "ministral": {"sliding_window": 4096},
    "mistral": {"sliding_window": 4096},
    "olmo3": {"sliding_window": 4096, "sliding_window_pattern": 4},
    "qwen2": _NO_WINDOW,
    "qwen2_5_vl": _NO_WINDOW,
    "qwen2_5_vl_text": _NO_WINDOW,
    "qwen2_moe": _NO_WINDOW,
    "qwen2_vl": _NO_WINDOW,
    "qwen2_vl_text": _NO_WINDOW,
    "qwen3": _NO_WINDOW,
    "qwen3_moe": _NO_WINDOW,
    "vaultgemma": _GEMMA2,
    "youtu": _LATENT,
}
"""What Transformers puts in the place of a field that a type's ``config.json`` leaves out, where it changes attention.
vLLM reads the configuration through Transformers. A test compares the two."""


def read_config(path: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model directory.

    Raises:
        UnsupportedModelError: if there is none, or it is not a JSON object.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise UnsupportedModelError(f"{path} is not a model directory: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot read {file}: {error}") from None
    if not isinstance(config, dict):
        raise UnsupportedModelError(f"{file} is not a JSON object")
    return config


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder whose layers are all alike."""

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int


class Decoder:
    """The decoder that a configuration describes.

    Args:
        config: the parsed ``config.json``.

    Attributes:
        fields: the decoder's own fields: a section of ``config``, or all of it.
        section: name of that section; None if the configuration is the decoder's.
        model_type: type of the decoder, or of the whole if the section names none.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.fields: Mapping[str, Any] = config
        self.section: str | None = None
        for names in WRAPPERS:
            inner: Any = config
            for name in names:
                inner = inner.get(name) if isinstance(inner, Mapping) else None
            if isinstance(inner, Mapping):
                self.fields, self.section = inner, ".".join(names)
                break
        self.model_type = str(self.fields.get("model_type") or config.get("model_type") or "unknown")

    @property
    def model_types(self) -> frozenset[str]:
        """Type of the decoder and of the model around it."""
        return frozenset({self.model_type, str(self._config.get("model_type") or self.model_type)})

    def get(self, name: str) -> Any:
        """A field of the decoder, or what its absence means for this type; None if it means nothing."""
        return self.fields.get(name, ABSENT.get(self.model_type, {}).get(name))

    def whole(self, name: str) -> Any:
        """A field of the decoder or, failing that, of the model around it."""
        found = self.get(name)
        return self._config.get(name) if found is None else found

    def first(self, names: tuple[str, ...]) -> Any:
        """The first of several names that says something."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    @property
    def layer_kinds(self) -> list[str] | None:
        """Kind of attention layer by layer, if the configuration lists it."""
        kinds = self.get("layer_types") or self.get("layers_block_type")
        return [str(kind) for kind in kinds] if isinstance(kinds, list) else None

    def geometry(self) -> Geometry:
        """Sizes of the decoder.

        Raises:
            LookupError, TypeError, ValueError: if they are not stated, or differ from layer to layer.
        """
        layers, heads = self._size(LAYERS), self._size(QUERY_HEADS)
        head_dim = self.first(HEAD_DIM)
        return Geometry(
            num_layers=layers,
            num_query_heads=heads,
            num_kv_heads=self._kv_heads(heads),
            head_dim=int(head_dim) if head_dim else self._size(HIDDEN) // heads,
            max_positions=int(self.first(POSITIONS) or 0),
        )

    def _size(self, names: tuple[str, ...]) -> int:
        value = self.first(names)
        if value is None:
            raise LookupError(f"{names[0]} is not stated")
        if int(value) <= 0:
            raise ValueError(f"{names[0]} is {value}")
        return int(value)

    def _kv_heads(self, query_heads: int) -> int:
        # Falcon and GPT-BigCode say "one head" with a flag, which Falcon's later layout overrules.
        if self.get("multi_query") and not self.get("new_decoder_architecture"):
            return 1
        inner = self.get("attn_config")  # DBRX
        grouped = inner.get("kv_n_heads") if isinstance(inner, Mapping) else None
        return int(grouped or self.first(KV_HEADS) or query_heads)
