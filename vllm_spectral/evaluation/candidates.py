"""The caches that can be compared: profiles as they are served, vLLM's own, and rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vllm_spectral.config import SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.profile.schema import Profile
from vllm_spectral.rivals import RIVALS, Rival, rival

STOCK = {"bf16": 16.0, "fp8": 8.0}
"""vLLM's own caches by name, with their bits per element."""
STRICT = "/strict"
"""Suffix of a name: without the exact tier."""

Engine = Literal["profile", "dense", "fp8"]


@dataclass(frozen=True)
class Candidate:
    """One cache.

    Attributes:
        name: unique in a run.
        engine: which engine it needs; all ``dense`` candidates share one.
        bits: stored bits per KV element in the pages, scales included.
        first, recent: tokens read from exact copies.
        family: what it is a setting of; one line in a plot over bits.
        config: of a profile's engine.
        rival: of a rival.
    """

    name: str
    engine: Engine
    bits: float
    first: int = 0
    recent: int = 0
    family: str = ""
    config: SpectralConfig | None = None
    rival: Rival | None = None


def of_profile(
    profile: Profile, path: Path, *, first: int, recent: int, exempt: frozenset[int], strict: bool
) -> Candidate:
    """A profile, served with or without the exact tier."""
    first, recent = (0, 0) if strict else (first, recent)
    return Candidate(
        profile.name + (STRICT if strict else ""),
        "profile",
        profile.bits_per_element,
        first,
        recent,
        f"{profile.provenance.basis} basis",
        SpectralConfig(path, profile.digest, exempt, first, recent),
    )


def fp8_runs_here() -> bool:
    """Whether vLLM 0.32 has a kernel for its fp8 cache on this CPU: only with AVX-512 or AMX."""
    return bool(torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported())


def named(names: Sequence[str], head_dim: int, *, first: int, recent: int) -> list[Candidate]:
    """Caches of vLLM itself and rivals by name; ``all`` for all that run here, with and without the exact tier.

    Raises:
        ConfigError: for an unknown name, or a cache that cannot run on this machine.
    """
    stock = [name for name in STOCK if name != "fp8" or fp8_runs_here()]
    wanted: list[str] = []
    for name in names:
        wanted += [*stock, *(r.name + end for r in RIVALS for end in ("", STRICT))] if name == "all" else [name]
    found = []
    for name in dict.fromkeys(wanted):
        if name in STOCK and name not in stock:
            raise ConfigError(
                "vLLM's fp8 cache needs AVX-512 or AMX on the CPU, which this machine lacks: leave fp8 out"
            )
        if name in STOCK:
            found.append(Candidate(name, "fp8" if name == "fp8" else "dense", STOCK[name], family=name))
            continue
        strict = name.endswith(STRICT)
        try:
            other = rival(name.removesuffix(STRICT))
        except ConfigError:
            known = [*STOCK, *(r.name for r in RIVALS)]
            raise ConfigError(
                f"unknown cache {name!r}: known are all, {', '.join(known)}; with {STRICT} appended: without the exact tier"
            ) from None
        tier = (0, 0) if strict else (first, recent)
        family = "TurboQuant" if name.startswith("turboquant") else other.name
        found.append(Candidate(name, "dense", other.bits(head_dim), *tier, family, rival=other))
    return found
