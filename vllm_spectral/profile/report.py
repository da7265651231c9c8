"""What a profile says, for people: a summary and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_spectral.errors import ProfileError
from vllm_spectral.profile.schema import Profile

BF16_BITS = 16


@dataclass(frozen=True)
class LayerSummary:
    """One layer; means over its KV heads.

    Attributes:
        key_bits, value_bits: bits per element of the codes alone.
        key_effective_rank, value_effective_rank: exponential of the entropy of the normalized spectrum
            (Roy and Vetterli, "The effective rank", 2007).
    """

    index: int
    key_bits: float
    value_bits: float
    key_effective_rank: float
    value_effective_rank: float


@dataclass(frozen=True)
class ProfileSummary:
    """A profile in numbers. Bytes per token cover all layers and KV heads."""

    name: str
    digest: str
    model: dict[str, Any]
    provenance: dict[str, Any]
    bits_per_element: float
    slot_bytes: int
    bytes_per_token: int
    uncompressed_bytes_per_token: int
    compression_ratio: float
    layers: list[LayerSummary]


def summarize(profile: Profile) -> ProfileSummary:
    """The numbers of a profile."""
    model = profile.fingerprint
    slots = model.num_layers * model.num_kv_heads
    dense = slots * 2 * model.head_dim * BF16_BITS // 8
    return ProfileSummary(
        name=profile.name,
        digest=profile.digest,
        model=asdict(model),
        provenance=asdict(profile.provenance),
        bits_per_element=profile.bits_per_element,
        slot_bytes=profile.slot_bytes,
        bytes_per_token=slots * profile.slot_bytes,
        uncompressed_bytes_per_token=dense,
        compression_ratio=dense / (slots * profile.slot_bytes),
        layers=[
            LayerSummary(
                index,
                float(layer.key_bits.float().mean()),
                float(layer.value_bits.float().mean()),
                _effective_rank(layer.key_spectrum),
                _effective_rank(layer.value_spectrum),
            )
            for index, layer in enumerate(profile.layers)
        ],
    )


def _effective_rank(spectrum: Tensor) -> float:
    share = spectrum.double() / spectrum.double().sum(-1, keepdim=True).clamp_min(1e-30)
    return float(torch.special.entr(share).sum(-1).exp().mean())


def plot_profile(profile: Profile, path: Path) -> None:
    """Write a figure: spectra and bits of keys and values, one line per layer (mean over KV heads).

    Raises:
        ProfileError: if the file cannot be written, or its ending names no image format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    colors = plt.get_cmap("viridis")
    for column, kind in enumerate(("key", "value")):
        for index, layer in enumerate(profile.layers):
            color = colors(index / max(len(profile.layers) - 1, 1))
            spectrum = getattr(layer, f"{kind}_spectrum").mean(0)
            axes[0, column].plot(spectrum / spectrum.sum(), color=color, linewidth=0.8)
            axes[1, column].plot(getattr(layer, f"{kind}_bits").float().mean(0), color=color, linewidth=0.8)
        axes[0, column].set(title=f"{kind}s: share of energy per rotated channel", yscale="log")
        axes[1, column].set(title=f"{kind}s: bits per rotated channel", xlabel="channel", ylim=(0, 8.2))
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, max(len(profile.layers) - 1, 1)), colors)
    figure.colorbar(scale, ax=axes, label="layer")
    figure.suptitle(
        f"{profile.name}: {profile.bits_per_element:.2f} bits per element, digest {profile.digest[:12]}",
        parse_math=False,
    )
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ProfileError(f"cannot write the plot {path}: {error}") from None
    finally:
        plt.close(figure)
