"""Quantization of one layer's keys and values into slots, and back into the rotated domain."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_spectral.codec import packing
from vllm_spectral.codec.codebook import Codebooks
from vllm_spectral.codec.layout import FLAT_FLAG, KEY_SCALE_OFFSET, VALUE_SCALE_OFFSET, PieceTable, SlotLayout
from vllm_spectral.codec.rotation import rotate

SCALE_STEPS_PER_OCTAVE = 8
SCALE_UNIT_INDEX = 64
NUM_SCALES = FLAT_FLAG
"""A scale is ``2 ** ((index - SCALE_UNIT_INDEX) / SCALE_STEPS_PER_OCTAVE)``: 2^-8 to 2^7.9 in steps of 9 %.
Seven bits suffice because codes are chosen after the scale is rounded, so that only the fit of the codebook suffers."""

SCALE_SEARCH = range(-4, 4)
"""Steps around the root mean square at which scales are tried."""


@dataclass(frozen=True)
class VectorCoding:
    """How the keys, or the values, of one layer are coded.

    Attributes:
        basis: ``[num_heads, head_dim, head_dim]`` float32, basis vectors as columns.
        deviation: ``[num_heads, head_dim]`` float32, typical magnitude of each rotated channel.
        flat_deviation: ``[num_heads]`` float32, typical magnitude of any channel, for the fallback.
        center: ``[num_heads, head_dim]`` float32, rotated; the fallback codes the difference from it.
        spectral: places and bits of the water-filled codes.
        flat: places and bits of the fallback's codes.
        scale_offset: byte of the slot that holds the scale.
    """

    basis: Tensor
    deviation: Tensor
    flat_deviation: Tensor
    center: Tensor
    spectral: PieceTable
    flat: PieceTable
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
        self.keys = self._coding(key_basis, key_deviation, key_sink, layout.keys, layout.flat_keys, KEY_SCALE_OFFSET)
        self.values = self._coding(
            value_basis, value_deviation, value_sink, layout.values, layout.flat_values, VALUE_SCALE_OFFSET
        )
        exponent = torch.arange(NUM_SCALES, dtype=torch.float64) - SCALE_UNIT_INDEX
        self._scales = torch.exp2(exponent / SCALE_STEPS_PER_OCTAVE).float()

    @staticmethod
    def _coding(
        basis: Tensor, deviation: Tensor, sink: Tensor, spectral: PieceTable, flat: PieceTable, offset: int
    ) -> VectorCoding:
        # A dead channel (zero variance) would divide by zero; it gets no bits, so any small width will do.
        flat_deviation = deviation.square().mean(dim=-1).sqrt().clamp_min(1e-6)
        floor = 1e-4 * flat_deviation[:, None]
        center = rotate(sink, basis)
        return VectorCoding(basis, deviation.maximum(floor), flat_deviation, center, spectral, flat, offset)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all tensors that must stay in memory to encode and decode this layer."""
        tensors = [self._scales]
        for coding in (self.keys, self.values):
            tensors += [coding.basis, coding.deviation, coding.flat_deviation, coding.center]
            for table in (coding.spectral, coding.flat):
                tensors += [table.bits, table.byte, table.shift, table.mask, table.place]
        return sum(t.numel() * t.element_size() for t in tensors)

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
        spectral_codes, spectral_scale, spectral_error = self._quantize(rotated, coding.deviation, coding.spectral.bits)
        flat_width = coding.flat_deviation[:, None].expand_as(coding.deviation)
        flat_codes, flat_scale, flat_error = self._quantize(rotated - coding.center, flat_width, coding.flat.bits)
        use_flat = flat_error < spectral_error
        zero = torch.zeros((), dtype=torch.int64)
        packing.pack(torch.where(use_flat[..., None], zero, spectral_codes), coding.spectral, slots)
        packing.pack(torch.where(use_flat[..., None], flat_codes, zero), coding.flat, slots)
        scale = torch.where(use_flat, flat_scale | FLAT_FLAG, spectral_scale)
        slots[..., coding.scale_offset] = scale.to(torch.uint8)

    def _quantize(self, rotated: Tensor, width: Tensor, bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes ``[T, H, D]`` int64, scale indices ``[T, H]`` int64 and squared errors ``[T, H]`` of one allocation.

        The scale with the smallest error is searched around the root mean square of the whitened channels that are
        stored. The search pays: real vectors have heavier tails than the codebooks' normal distribution, and a fixed
        rule trades clipped peaks against coarse steps wrongly for most of them.
        """
        stored = bits > 0
        whitened = rotated / width
        power = (whitened.square() * stored).sum(-1) / stored.sum(-1).clamp_min(1)
        center = torch.log2(power.sqrt().clamp_min(1e-30)) * SCALE_STEPS_PER_OCTAVE + SCALE_UNIT_INDEX
        best_index = torch.zeros(rotated.shape[:-1], dtype=torch.int64)
        best_error = torch.full(rotated.shape[:-1], torch.inf)
        for offset in SCALE_SEARCH:
            index = (center.round().long() + offset).clamp(0, NUM_SCALES - 1)
            scale = self._scales[index][..., None]
            restored = self.codebooks.nearest_levels(whitened / scale, bits) * width * scale
            error = (rotated - restored).square().sum(-1)
            better = error < best_error
            best_index = torch.where(better, index, best_index)
            best_error = torch.where(better, error, best_error)
        codes = self.codebooks.nearest_codes(whitened / self._scales[best_index][..., None], bits)
        return codes, best_index, best_error

    def _decode(self, slots: Tensor, coding: VectorCoding) -> Tensor:
        header = slots[..., coding.scale_offset].long()
        scale = self._scales[header & (FLAT_FLAG - 1)][..., None]
        rotated = self._levels(slots, coding.spectral) * coding.deviation * scale
        token, head = (header >= FLAT_FLAG).nonzero(as_tuple=True)
        if token.numel():
            rows = torch.unique(token)
            flat = self._levels(slots[rows], coding.flat) * coding.flat_deviation[:, None] * scale[rows]
            rotated[token, head] = (flat + coding.center)[torch.searchsorted(rows, token), head]
        return rotated

    def _levels(self, slots: Tensor, table: PieceTable) -> Tensor:
        return self.codebooks.levels_of(packing.unpack(slots, table), table.bits)
