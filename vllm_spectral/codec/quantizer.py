"""Quantization of one layer's keys and values into slots, and back into the rotated domain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spectral.codec import packing
from vllm_spectral.codec.codebook import Codebooks, normal_distortion
from vllm_spectral.codec.layout import FLAT_FLAG, FieldTable, SlotLayout
from vllm_spectral.codec.rotation import rotate

SCALE_STEPS_PER_OCTAVE = 8
SCALE_UNIT_INDEX = 64
NUM_SCALES = FLAT_FLAG
"""A scale is ``2 ** ((index - SCALE_UNIT_INDEX) / SCALE_STEPS_PER_OCTAVE)``: 2^-8 to 2^7.9 in steps of 9 %.
Seven bits suffice because codes are chosen after the scale is rounded, so that only the fit of the codebook suffers."""

SCALE_SEARCH = range(8)
"""Steps above the root mean square at which scales are tried. Searching on its upper side costs squared error and gains
attention: the codebooks' levels are means of their cells, which shrinks every vector, and the larger scale undoes it."""
FALLBACK_GAIN = 0.5
"""The fallback is taken if it leaves at most this share of the error. Most vectors that would gain less gain it by chance."""
FALLBACK_SLACK = 0.5
"""It is tried if this share of the error that the codebooks predict for it would suffice. Trying it costs as much as coding
the vector, and few vectors take it."""


@dataclass(frozen=True)
class VectorCoding:
    """How the keys, or the values, of one layer are coded.

    Attributes:
        basis: ``[num_heads, head_dim, head_dim]`` float32, basis vectors as columns.
        center: ``[num_heads, head_dim]`` float32, rotated; the fallback codes the difference from it.
        width: ``[num_heads, head_dim]`` float32, typical magnitude of each rotated channel.
        flat_width: the same for the fallback: equal for all channels of a head.
        spectral: places and bits of the water-filled codes.
        flat: places and bits of the fallback's codes.
        flat_distortion: ``[num_heads]`` float32, what the codebooks predict as the fallback's squared error for a vector
            whose mean square is that of ``flat_width``.
        scale_offset: byte of the slot that holds the scale.
    """

    basis: Tensor
    center: Tensor
    width: Tensor
    flat_width: Tensor
    spectral: FieldTable
    flat: FieldTable
    flat_distortion: Tensor
    scale_offset: int


class LayerCodec:
    """Encodes and decodes the slots of one layer.

    Args:
        key_basis, value_basis: ``[num_heads, head_dim, head_dim]`` float32, basis vectors as columns.
        key_deviation, value_deviation: ``[num_heads, head_dim]`` float32, root of the channels' second moments.
        key_sink, value_sink: ``[num_heads, head_dim]`` float32, not rotated: the typical first token of a request. The
            fallback codes what differs from it. Attention sinks are nearly the same vector in every request, and an
            error on their values enters every later output with a large weight.
        layout: the layer's byte layout.
        codebooks: the codebooks, shared by all layers.
    """

    def __init__(
        self,
        key_basis: Tensor,
        value_basis: Tensor,
        key_deviation: Tensor,
        value_deviation: Tensor,
        key_sink: Tensor,
        value_sink: Tensor,
        layout: SlotLayout,
        codebooks: Codebooks,
    ) -> None:
        self.layout = layout
        self.codebooks = codebooks
        self.keys = self._coding(key_basis, key_deviation, key_sink, layout.keys, layout.flat_keys, 0)
        self.values = self._coding(value_basis, value_deviation, value_sink, layout.values, layout.flat_values, 1)
        exponent = (torch.arange(NUM_SCALES, dtype=torch.float64) - SCALE_UNIT_INDEX) / SCALE_STEPS_PER_OCTAVE
        self.scales = torch.exp2(exponent).float()
        self.inverse_scales = torch.exp2(-exponent).float()
        # A mean square in [2 ** (2 e - step), 2 ** (2 e + step)) belongs to the scale 2 ** e.
        self.scale_bounds = torch.exp2(2 * exponent[1:] - 1 / SCALE_STEPS_PER_OCTAVE).float()

    @staticmethod
    def _coding(
        basis: Tensor, deviation: Tensor, sink: Tensor, spectral: FieldTable, flat: FieldTable, offset: int
    ) -> VectorCoding:
        # A dead channel (zero variance) would divide by zero; it gets no bits, so any small width will do.
        flat_width = (
            deviation.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6).expand_as(deviation).contiguous()
        )
        width = deviation.maximum(1e-4 * flat_width)
        flat_distortion = (flat_width.square() * torch.tensor(normal_distortion())[flat.bits]).sum(-1)
        return VectorCoding(basis, rotate(sink, basis), width, flat_width, spectral, flat, flat_distortion, offset)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all tensors that must stay in memory to encode and decode this layer."""
        tensors = [self.scales, self.inverse_scales, self.scale_bounds]
        for coding in (self.keys, self.values):
            tensors += [coding.basis, coding.center, coding.width, coding.flat_width]
        return sum(t.numel() * t.element_size() for t in tensors) + self.layout.resident_bytes

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Compress new tokens. The bytes of a token depend on nothing but its own key and value.

        Args:
            keys: ``[num_tokens, num_heads, head_dim]``, any float dtype, as the model produced them.
            values: likewise.

        Returns:
            ``[num_tokens, num_heads, slot_bytes]`` uint8.
        """
        slots = torch.zeros(*keys.shape[:2], self.layout.slot_bytes, dtype=torch.uint8)
        self._encode(rotate(keys, self.keys.basis), self.keys, slots)
        self._encode(rotate(values, self.values.basis), self.values, slots)
        return slots

    def decode_keys(self, slots: Tensor) -> Tensor:
        """Keys in the rotated domain.

        Args:
            slots: ``[num_tokens, num_heads, slot_bytes]`` uint8.

        Returns:
            ``[num_tokens, num_heads, head_dim]`` float32, rotated by the key basis.
        """
        return self._decode(slots, self.keys)

    def decode_values(self, slots: Tensor) -> Tensor:
        """Values in the rotated domain; shapes as :meth:`decode_keys`."""
        return self._decode(slots, self.values)

    def _encode(self, rotated: Tensor, coding: VectorCoding, slots: Tensor) -> None:
        codes, scale, error, _ = self._quantize(rotated, coding.width, coding.spectral.bits)
        flat_codes, flat_scale, flat_error, power = self._quantize(
            rotated - coding.center, coding.flat_width, coding.flat.bits
        )
        enough = error * FALLBACK_GAIN
        use_flat = (power * (coding.flat_distortion * FALLBACK_SLACK) < enough) & (flat_error < enough)
        zero = torch.zeros((), dtype=torch.int32)
        packing.pack(torch.where(use_flat[..., None], zero, codes), coding.spectral, slots)
        packing.pack(torch.where(use_flat[..., None], flat_codes, zero), coding.flat, slots)
        slots[..., coding.scale_offset] = torch.where(use_flat, flat_scale | FLAT_FLAG, scale).to(torch.uint8)

    def _quantize(self, rotated: Tensor, width: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes ``[T, H, D]`` int32, scale indices ``[T, H]`` int64, squared errors and whitened mean squares, ``[T, H]``.

        The scale with the smallest error is searched around the root mean square of the whitened channels that are
        stored. The search pays: real vectors have heavier tails than the codebooks' normal distribution, and a fixed
        rule trades clipped peaks against coarse steps wrongly for most of them.

        Every operation is a single float32 one and sums run channel by channel, so that a kernel can repeat them
        exactly and equal bytes can be demanded of it.
        """
        stored = bits > 0
        whitened = rotated * (1 / width)
        power = _ordered_sum(whitened.square() * stored) * (1 / stored.sum(-1).clamp_min(1).float())
        center = torch.bucketize(power, self.scale_bounds, right=True)
        best_index = torch.zeros(rotated.shape[:-1], dtype=torch.int64)
        best_error = torch.full(rotated.shape[:-1], torch.inf)
        for offset in SCALE_SEARCH:
            index = (center + offset).clamp(0, NUM_SCALES - 1)
            codes = self.codebooks.nearest_codes(whitened * self.inverse_scales[index][..., None], bits)
            restored = self.codebooks.levels_of(codes, bits) * self.scales[index][..., None]
            error = _ordered_sum(((whitened - restored) * width).square())
            better = error < best_error
            best_index = torch.where(better, index, best_index)
            best_error = torch.where(better, error, best_error)
        codes = self.codebooks.nearest_codes(whitened * self.inverse_scales[best_index][..., None], bits)
        return codes, best_index, best_error, power

    def _decode(self, slots: Tensor, coding: VectorCoding) -> Tensor:
        header = slots[..., coding.scale_offset].long()
        scale = self.scales[header & (FLAT_FLAG - 1)][..., None]
        rotated = self._levels(slots, coding.spectral) * coding.width * scale
        token, head = (header >= FLAT_FLAG).nonzero(as_tuple=True)
        if token.numel():
            rows = torch.unique(token)
            flat = self._levels(slots[rows], coding.flat) * coding.flat_width * scale[rows] + coding.center
            rotated[token, head] = flat[torch.searchsorted(rows, token), head]
        return rotated

    def _levels(self, slots: Tensor, table: FieldTable) -> Tensor:
        return self.codebooks.levels_of(packing.unpack(slots, table), table.bits)


def _ordered_sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, one element after the other: float32 sums depend on their order."""
    total = torch.zeros(terms.shape[:-1])
    for term in terms.unbind(-1):
        total = total + term
    return total
