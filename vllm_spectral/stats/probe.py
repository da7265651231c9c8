"""What compression does to one request's attention in one layer, measured on tokens that are still at hand exactly.

A step has its own tokens' keys and values as the model produced them, and the exact tier has the most recent ones. For
these, and for nothing else, the truth is known while serving: attention over them alone is computed from the exact
vectors and compared with what the pages give.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_spectral.codec.codebook import normal_distortion
from vllm_spectral.codec.layout import FLAT_FLAG
from vllm_spectral.codec.quantizer import LayerCodec, VectorCoding
from vllm_spectral.codec.rotation import rotate, unrotate
from vllm_spectral.stats.drift import LeadingChannels
from vllm_spectral.stats.moments import SINK_TOKENS

MOST_TOKENS = 256
"""Tokens that one probe looks at, the most recent ones: enough for means that are good to a few percent."""


@dataclass(frozen=True)
class Probe:
    """One layer, one request, one step. Means over the layer's heads on this rank.

    Attributes:
        num_tokens: tokens looked at.
        output_error: norm of the attention output's error over the norm of the output, root of mean squares over heads.
        attention_kl: KL divergence of the attention weights, from exact to compressed, in nats.
        error_ratio: squared error of the vectors over what the profile predicts for vectors of its own spectrum; the larger
            one of keys and values. Sinks are left out, as in the profile's moments.
        fallback_share: share of keys and values that were coded flat.
        clipped_share: share of codes whose channel lies past the end of its codebook, by more than half the codebook's
            last step.
        drift: energy that the profile has in its leading channels and these vectors have elsewhere; the larger one of keys
            and values.
        kernel_error: norm of the difference of the kernels' output and the reference's over the same slots, over the norm of
            the latter; 0 without kernels.
    """

    num_tokens: int
    output_error: float
    attention_kl: float
    error_ratio: float
    fallback_share: float
    clipped_share: float
    drift: float
    kernel_error: float

    def to_wire(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dict(vars(self))


def expected_error(coding: VectorCoding) -> Tensor:
    """``[num_heads]`` float32: the share of a vector's energy that quantization is to leave as squared error.

    Every channel has its variance in the profile times the distortion of its bits under the normal distribution. That
    takes the profile's spectrum and bits at their word, and neither its bases nor its codebooks.
    """
    energy = coding.width.square()
    distortion = torch.tensor(normal_distortion(), dtype=torch.float32)[coding.spectral.bits]
    return (energy * distortion).sum(-1) / energy.sum(-1)


def probe(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    codec: LayerCodec,
    scale: float,
    served: Tensor | None = None,
) -> Probe:
    """Compare attention over some tokens' slots with attention over their exact keys and values.

    Args:
        query: ``[num_query_heads, head_dim]`` of the request's newest token, any float dtype.
        keys, values: ``[num_tokens, num_heads, head_dim]``, exact.
        slots: ``[num_tokens, num_heads, slot_bytes]`` uint8, what the pages hold of them.
        positions: ``[num_tokens]`` int64, their places in the request.
        codec: the layer's codec.
        scale: factor of the scores.
        served: ``[num_query_heads, head_dim]``, attention over these tokens' pages as the kernels compute it; None: by the
            reference.
    """
    heads, dim = keys.shape[1:]
    keys, values = keys.float(), values.float()
    grouped = query.float().view(heads, -1, dim) * scale  # [H, G, D]
    restored_keys, restored_values = codec.decode_keys(slots), codec.decode_values(slots)
    exact = (grouped @ keys.permute(1, 2, 0)).log_softmax(-1)
    rotated = rotate(grouped.transpose(0, 1), codec.keys.basis).transpose(0, 1)
    stored = (rotated @ restored_keys.permute(1, 2, 0)).log_softmax(-1)
    truth = exact.exp() @ values.transpose(0, 1)
    accumulated = stored.exp() @ restored_values.transpose(0, 1)
    expected = unrotate(accumulated.transpose(0, 1), codec.values.basis).transpose(0, 1)
    output = expected if served is None else served.float().view_as(truth)
    error = (output - truth).square().sum((1, 2)) / truth.square().sum((1, 2)).clamp_min(1e-30)
    kl = torch.nn.functional.kl_div(stored, exact, reduction="none", log_target=True).sum(-1)
    parts = _parts((keys, values), (restored_keys, restored_values), slots, positions, codec)
    return Probe(
        num_tokens=len(positions),
        output_error=float(error.mean().sqrt()),
        attention_kl=float(kl.mean()),
        error_ratio=_larger(part.error_ratio.mean() for part in parts),
        fallback_share=sum(part.fallback_share for part in parts) / len(parts),
        clipped_share=sum(part.clipped_share for part in parts) / len(parts),
        drift=_larger(part.drift.mean() for part in parts),
        kernel_error=float((output - expected).norm() / expected.norm().clamp_min(1e-30)),
    )


def head_figures(keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, codec: LayerCodec) -> Tensor:
    """``[num_heads, 4]`` float32: error ratio of the keys and of the values, drift of both; see :class:`Probe`.

    Args:
        keys, values, slots, positions, codec: as in :func:`probe`; the first two float32.
    """
    parts = _parts((keys, values), (codec.decode_keys(slots), codec.decode_values(slots)), slots, positions, codec)
    return torch.stack([part.error_ratio for part in parts] + [part.drift for part in parts], dim=1).float()


def _larger(values: Iterable[Tensor]) -> float:
    """The larger value; not a number if one of them is not, which ``max`` would hide."""
    return float(torch.stack(list(values)).max())


@dataclass(frozen=True)
class _Part:
    """What is found in the keys, or in the values; see :class:`Probe`. Error ratio and drift are ``[num_heads]`` float64."""

    error_ratio: Tensor
    fallback_share: float
    clipped_share: float
    drift: Tensor


def _parts(
    exact: tuple[Tensor, Tensor], restored: tuple[Tensor, Tensor], slots: Tensor, positions: Tensor, codec: LayerCodec
) -> list[_Part]:
    """Of the keys, and of the values."""
    (keys, values), (restored_keys, restored_values) = exact, restored
    return [
        _vectors(keys, restored_keys, slots, positions, codec, codec.keys),
        _vectors(values, restored_values, slots, positions, codec, codec.values),
    ]


def _vectors(
    exact: Tensor, restored: Tensor, slots: Tensor, positions: Tensor, codec: LayerCodec, coding: VectorCoding
) -> _Part:
    rotated = rotate(exact, coding.basis)
    header = slots[..., coding.scale_offset].long()
    flat = header >= FLAT_FLAG
    keep = positions >= SINK_TOKENS
    ratio = drift = torch.zeros(exact.shape[1], dtype=torch.float64)
    if bool(keep.any()):
        error = (rotated - restored)[keep].square().sum((0, 2))
        energy = rotated[keep].square().sum(0)
        # Eight bits everywhere would predict next to nothing; below a thousandth arithmetic itself is seen.
        expected = expected_error(coding).clamp_min(1e-3)
        ratio = (error / energy.sum(-1).clamp_min(1e-30) / expected).double()
        drift = LeadingChannels(coding).shortfall(energy)
    bits = coding.spectral.bits
    scale = codec.scales[header & (FLAT_FLAG - 1)][..., None]
    whitened = (rotated / (coding.width * scale)).abs()
    past = whitened > _ends(codec, bits)
    coded = (bits > 0) & ~flat[..., None]
    clipped = float((past & coded).sum()) / max(int(coded.sum()), 1)
    return _Part(ratio, float(flat.float().mean()), clipped, drift)


def _ends(codec: LayerCodec, bits: Tensor) -> Tensor:
    """``[num_heads, head_dim]``: how far a channel reaches in units of its codebook, before it is clipped."""
    levels, last = codec.codebooks, (1 << bits) - 1
    top = levels.levels_of(last, bits)
    return top + (top - levels.levels_of((last - 1).clamp_min(0), bits)) / 2
