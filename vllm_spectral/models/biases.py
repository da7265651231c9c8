"""Key biases, read from the weights: layers whose keys lie so far from zero that no bits make up for it.

The key of a token is ``W norm(x) + b``, then rotated by its position. Rotation keeps the size of ``b`` in every plane, and
the eigenbasis gives those planes channels of their own, with more bits than the others. That ends at the widest
codebook: let the rest of a key have the root mean square ``s`` per channel and a biased channel ``r s``. At B bits a
channel's error is ``sqrt(D(B))`` of its size, so that at 4 bits on average the error of the biased channel passes that of
the others at ``r = sqrt(D(4) / D(MAX_BITS))``. Beyond, it grows with the bias, and no allocation helps.

Some layers of Qwen2 and Qwen2.5, the first and the last in small models, have biases tens of times those of the others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vllm_spectral.codec.codebook import MAX_BITS, normal_distortion
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.models.support import KEY_BIAS_NOTE, Support, Verdict

ORDINARY_BITS = 4
"""Mean bits per element at which the limit is drawn: the default of ``calibrate``."""
LIMIT = math.sqrt(normal_distortion()[ORDINARY_BITS] / normal_distortion()[MAX_BITS])
"""Largest ratio of a biased key channel to the rest of the key that more bits make up for; about 15."""
ROWS_PER_HEAD = 16
"""Rows of the key projection that are read per head: enough for a root mean square, and little of the weights."""

_KEY_BIAS = re.compile(
    r"(?P<layer>.*\b(?:layers|h)\.(?P<index>\d+)\.)(?P<attention>self_attn|attn|attention)\.k_proj\.bias$"
)
_FUSED_BIAS = re.compile(r"\b(?:layers|h)\.\d+\..*\b(?:query_key_value|c_attn|qkv_proj|Wqkv|wqkv|W_pack)\.bias$")
_NO_DECODER = re.compile(r"vision|visual|image|audio|speech|encoder|projector|draft|mtp")
_NORMS = ("input_layernorm", "self_attn_layer_norm", "ln_1")
"""Names of the norm in front of attention."""
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class KeyBias:
    """The bias of one layer's keys against the rest of them, in the head where it is worst.

    Attributes:
        layer: index of the layer.
        peak: largest magnitude of the constant part in one channel.
        spread: estimated root mean square per channel of what varies from token to token; None if the weights do not
            show it (quantized, or of unknown names).
    """

    layer: int
    peak: float
    spread: float | None

    @property
    def ratio(self) -> float | None:
        """Peak against spread."""
        return self.peak / self.spread if self.spread else None


@dataclass(frozen=True)
class BiasSurvey:
    """The key biases of a model.

    Attributes:
        layers: one entry per layer with a key bias, in order.
        unread: why biases could not be judged; None if they could.
    """

    layers: tuple[KeyBias, ...]
    unread: str | None = None

    @property
    def exempt_layers(self) -> tuple[int, ...]:
        """Layers that are better left exact."""
        return tuple(bias.layer for bias in self.layers if bias.ratio is not None and bias.ratio > LIMIT)


def survey(model: ModelDescription) -> BiasSurvey:
    """Read the key biases of a model, and of its key projections and norms what their scale needs.

    Args:
        model: a model with safetensors weights. Without any, or with damaged ones, nothing is judged.
    """
    if not any(model.path.glob("*.safetensors")):
        return BiasSurvey((), "there are no *.safetensors weights")
    try:
        with ExitStack() as stack:
            return _survey(model, _Weights(model.path, stack))
    except (OSError, SafetensorError) as error:
        return BiasSurvey((), f"the weights cannot be read: {error}")


def with_biases(support: Support, found: BiasSurvey, num_layers: int) -> Support:
    """The verdict on a model after its key biases were read.

    Args:
        support: the verdict of the configuration; a refusal stays as it is.
        found: the biases.
        num_layers: layers of the model.
    """
    if support.verdict is Verdict.REFUSED:
        return support
    notes = [note for note in support.notes if note != KEY_BIAS_NOTE]
    if found.unread:
        return replace(support, notes=(*notes, f"key biases were not judged: {found.unread}"))
    exempt = found.exempt_layers
    judged = [(bias.ratio, bias.layer) for bias in found.layers if bias.ratio is not None and bias.layer not in exempt]
    if judged:
        ratio, layer = max(judged)
        notes.append(
            f"key biases of {len(judged)} layers are within the limit of {LIMIT:.1f}: at most {ratio:.1f} times the rest "
            f"of the key (layer {layer})"
        )
    if not exempt:
        return replace(support, notes=tuple(notes))
    if len(exempt) == num_layers:
        notes.append("that is every layer: nothing would be compressed")
    reasons = tuple(
        f"layer {bias.layer}: its key bias is {bias.ratio:.0f} times the rest of the key; above {LIMIT:.1f} even "
        f"{MAX_BITS} bits leave a larger error in it than {ORDINARY_BITS} bits in the rest"
        for bias in found.layers
        if bias.layer in exempt
    )
    return replace(
        support,
        verdict=Verdict.SUPPORTED_WITH_EXEMPT_LAYERS,
        reasons=reasons,
        notes=tuple(notes),
        exempt_layers=exempt,
    )


class _Weights:
    """Tensors by name over all weight files; only what is asked for is read."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file_of: dict[str, Any] = {}
        for file in sorted(path.glob("*.safetensors")):
            # safetensors has no types of its own for what it opens.
            opened: Any = stack.enter_context(safe_open(file, framework="pt"))
            self._file_of |= dict.fromkeys(opened.keys(), opened)

    def names(self) -> Iterator[str]:
        return (name for name in sorted(self._file_of) if not _NO_DECODER.search(name))

    def floats(self, name: str) -> Any:
        """A slice of a float tensor, to be read by indexing; None if there is no such tensor."""
        if name not in self._file_of:
            return None
        found = self._file_of[name].get_slice(name)
        return found if found.get_dtype() in _FLOATS else None

    def vector(self, name: str) -> Tensor | None:
        """A whole float tensor as float64; None if there is no such tensor."""
        found = self.floats(name)
        return None if found is None else found[:].double()


def _survey(model: ModelDescription, weights: _Weights) -> BiasSurvey:
    biases: dict[int, KeyBias] = {}
    fused = None
    for name in weights.names():
        fused = fused or (name if _FUSED_BIAS.search(name) else None)
        match = _KEY_BIAS.match(name)
        bias = weights.vector(name) if match else None
        if match is None or bias is None or bias.numel() != model.num_kv_heads * model.head_dim:
            continue
        index = int(match["index"])
        if index < model.num_layers:
            projection = name.removesuffix("bias") + "weight"
            biases[index] = _layer_bias(index, bias, projection, match["layer"], weights, model)
    if fused and not biases:
        return BiasSurvey((), f"they lie inside {fused}")
    layers = tuple(biases[index] for index in sorted(biases))
    blind = [bias for bias in layers if bias.spread is None]
    if blind:
        worst = sorted(blind, key=lambda bias: -bias.peak)[:3]
        sizes = ", ".join(f"{bias.peak:.3g} (layer {bias.layer})" for bias in worst)
        return BiasSurvey(
            layers, f"the key projection is quantized or its norm unknown; the largest biases are {sizes}"
        )
    return BiasSurvey(layers)


def _layer_bias(
    index: int, bias: Tensor, projection: str, prefix: str, weights: _Weights, model: ModelDescription
) -> KeyBias:
    """One layer's bias in its worst head.

    After the norm the hidden channels have mean square 1, so that a key channel varies by about the norm of its row of
    ``W diag(gain)``. A norm's own bias adds a constant part to the key, here to the channels that are sampled.
    """
    rows = weights.floats(projection)
    norm = next((prefix + name for name in _NORMS if weights.floats(f"{prefix}{name}.weight") is not None), None)
    gain = weights.vector(f"{norm}.weight") if norm else None
    if rows is None or gain is None or rows.get_shape() != [bias.numel(), gain.numel()]:
        return KeyBias(index, float(bias.abs().max()), None)
    shift = weights.vector(f"{norm}.bias")
    places = torch.linspace(0, model.head_dim - 1, min(ROWS_PER_HEAD, model.head_dim)).round().long()
    heads = []
    for head, own in enumerate(bias.view(model.num_kv_heads, model.head_dim)):
        first = head * model.head_dim
        sample = torch.cat([rows[first + place : first + place + 1] for place in places.tolist()]).double()
        spread = float((sample * gain).square().sum(dim=1).mean().sqrt())
        constant = own if shift is None else own.index_add(0, places, sample @ shift)
        heads.append(KeyBias(index, float(constant.abs().max()), spread or None))
    return max(heads, key=lambda bias: bias.ratio or 0.0)
