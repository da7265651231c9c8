"""What a profile holds, and how a layer's codec is made from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from vllm_spectral.codec.codebook import Codebooks
from vllm_spectral.codec.layout import SlotLayout
from vllm_spectral.codec.quantizer import LayerCodec
from vllm_spectral.models.description import ModelFingerprint

SCHEMA_VERSION = 2
BasisKind = Literal["spectral", "hadamard"]
CODEBOOKS = "codebooks"
"""Name of the one tensor in every file that belongs to no layer."""
CANARY = "canary"
"""Name of the tensor with the :class:`Expectation`, in files that have one."""
FIGURES = 4


@dataclass(frozen=True)
class Provenance:
    """Where a profile comes from.

    Attributes:
        basis: kind of basis.
        requested_bits: the ``--bits`` it was made for.
        text_source: ``"none"``, ``"built-in prompts"``, ``"live traffic"`` or the names of the user's files.
        num_tokens: tokens whose keys and values were measured.
        seed: seed of sampling and signs.
        created: ISO 8601 date; the only field outside the digest, so that equal calibrations have equal digests.
        versions: versions of vllm-spectral, vllm and torch.
    """

    basis: BasisKind
    requested_bits: float
    text_source: str
    num_tokens: int
    seed: int
    created: str
    versions: dict[str, str]


def rank_heads(num_kv_heads: int, rank: int, world: int) -> tuple[int, int]:
    """First and number of a tensor-parallel rank's KV heads: a contiguous share, or a replica if ranks outnumber heads."""
    return rank * num_kv_heads // world, max(num_kv_heads // world, 1)


@dataclass(frozen=True)
class LayerProfile:
    """Static data of one layer, for all KV heads of the model (a tensor-parallel rank slices its own).

    Attributes:
        key_basis, value_basis: ``[num_kv_heads, head_dim, head_dim]`` float32, basis vectors as columns.
        key_spectrum, value_spectrum: ``[num_kv_heads, head_dim]`` float32, second moment of each rotated channel.
        key_sink, value_sink: ``[num_kv_heads, head_dim]`` float32, mean of requests' first tokens, not rotated.
        key_bits, value_bits: ``[num_kv_heads, head_dim]`` uint8.
    """

    key_basis: Tensor
    value_basis: Tensor
    key_spectrum: Tensor
    value_spectrum: Tensor
    key_sink: Tensor
    value_sink: Tensor
    key_bits: Tensor
    value_bits: Tensor

    def heads(self, first: int, count: int) -> LayerProfile:
        """The same layer, restricted to ``count`` KV heads from ``first`` on; shares memory with it."""
        part = slice(first, first + count)
        return LayerProfile(**{name: tensor[part] for name, tensor in vars(self).items()})

    def shard(self, rank: int, world: int) -> LayerProfile:
        """The KV heads of one tensor-parallel rank; copies, so that the others' may be let go."""
        if world == 1:
            return self
        own = self.heads(*rank_heads(self.key_bits.shape[0], rank, world))
        return LayerProfile(**{name: tensor.clone() for name, tensor in vars(own).items()})

    def codec(self, slot_bytes: int, codebooks: Codebooks) -> LayerCodec:
        """Build the layer's codec; raises ``ValueError`` if the bits do not fit ``slot_bytes``."""
        return LayerCodec(
            self.key_basis,
            self.value_basis,
            self.key_spectrum.sqrt(),
            self.value_spectrum.sqrt(),
            self.key_sink,
            self.value_sink,
            SlotLayout(self.key_bits.long(), self.value_bits.long(), slot_bytes),
            codebooks,
        )


def tensor_shapes(num_kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """The shape of each field of a :class:`LayerProfile`."""
    vector = (num_kv_heads, head_dim)
    names = [field.name for field in fields(LayerProfile)]
    return {name: (*vector, head_dim) if name.endswith("basis") else vector for name in names}


@dataclass(frozen=True)
class Expectation:
    """What the profile made of the canary's tokens where it was made; see :mod:`vllm_spectral.stats.canary`.

    Attributes:
        tokens: digest of the token ids.
        figures: ``[num_layers, num_kv_heads, 4]`` float32, as :func:`vllm_spectral.stats.probe.head_figures` has them.
    """

    tokens: str
    figures: Tensor

    def of_layer(self, layer: int, world: int) -> tuple[float, float]:
        """Error ratio and drift that a server of ``world`` tensor-parallel ranks will find in a layer.

        Every rank says the larger of its keys' and its values' means over its heads, and their mean is what counts.
        """
        heads = self.figures[layer].double()
        found = []
        for rank in range(world):
            first, count = rank_heads(len(heads), rank, world)
            ratios, drifts = heads[first : first + count].mean(0).view(2, 2)
            found.append((float(ratios.max()), float(drifts.max())))
        ratio, drift = (sum(column) / world for column in zip(*found, strict=True))
        return ratio, drift


@dataclass(frozen=True)
class Profile:
    """A complete profile.

    Attributes:
        name: short human name, shown by the server.
        fingerprint: the model it belongs to.
        slot_bytes: bytes per (token, KV head, layer).
        codebooks: levels and lookup tables; the file holds the levels.
        layers: one entry per model layer, by layer index.
        provenance: how it was made.
        expectation: what to expect of the canary; None where no model ran when it was made.
        digest: hex SHA-256 over all of the above but ``provenance.created``.
    """

    name: str
    fingerprint: ModelFingerprint
    slot_bytes: int
    codebooks: Codebooks
    layers: tuple[LayerProfile, ...]
    provenance: Provenance
    expectation: Expectation | None = None
    digest: str = ""

    @property
    def bits_per_element(self) -> float:
        """Stored bits per KV element, scales and padding included."""
        return 8 * self.slot_bytes / (2 * self.fingerprint.head_dim)
