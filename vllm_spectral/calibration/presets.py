"""Named choices of budget and basis. What each costs in fidelity is in ``docs/quality.md``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_spectral.profile.schema import BasisKind


@dataclass(frozen=True)
class Preset:
    """One choice.

    Attributes:
        bits: stored bits per element, scales included.
        basis: kind of basis.
        summary: for the help.
    """

    bits: float
    basis: BasisKind
    summary: str


PRESETS: dict[str, Preset] = {
    "quality": Preset(4.0, "spectral", "4 times the tokens of bf16; also good with every token compressed"),
    "balanced": Preset(3.0, "spectral", "5.3 times; closer to bf16 than vLLM's fp8 cache, with the exact tier"),
    "compact": Preset(2.0, "spectral", "8 times; visible loss, for when nothing else fits"),
    "instant": Preset(4.0, "hadamard", "4 times; needs no calibration, and no model loaded to make it"),
}
DEFAULT_PRESET = "quality"
"""The only one that holds without the exact tier, too, which a full house can crowd out."""
