"""Our configuration inside vLLM: ``additional_config={"spectral": {...}}``, parsed once, frozen."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_spectral.errors import ConfigError

CONFIG_KEY = "spectral"
DISABLE_VARIABLE = "VLLM_SPECTRAL_DISABLE"
UNPROVEN = "spectral pages were not yet run on a GPU: nothing is known of their answers and their speed there"
"""Said wherever a GPU is met."""
_FLAGS = ("allow_unproven_device",)
_COUNTS = ("exact_first_tokens", "exact_recent_tokens", "exact_bytes", "fidelity_every")


class Mode(StrEnum):
    """What the backend does with a layer."""

    SERVE = "serve"
    """Store compressed pages and attend over them."""
    CALIBRATE = "calibrate"
    """Run stock attention and accumulate second moments."""
    COMPARE = "compare"
    """Keep stock pages; attend as stock vLLM, exactly, or as another quantized cache would."""


@dataclass(frozen=True)
class SpectralConfig:
    """The parsed configuration.

    Attributes:
        profile: path of the profile; needed to SERVE.
        digest: digest the profile must have. vLLM hashes ``additional_config`` into its own config hash, so that
            naming the digest there keeps anything cached under that hash apart per profile.
        exempt_layers: indices of layers left uncompressed, on stock pages and the stock kernel.
        exact_first_tokens: first tokens of every request that are read from exact copies.
        exact_recent_tokens: most recent tokens that are read from exact copies, a query's own included.
        exact_bytes: size of the pool of exact copies per worker, taken out of the memory vLLM was given for the cache;
            0 for none; None: what ``max_num_seqs`` requests need, at most a 24th of that memory.
        fidelity_every: one step in so many, about, is sampled for fidelity; 0: none.
        allow_unproven_device: whether to run on a GPU, where nothing of this was run yet.
        mode: what the backend does.
    """

    profile: Path | None = None
    digest: str | None = None
    exempt_layers: frozenset[int] = frozenset()
    exact_first_tokens: int = 4
    exact_recent_tokens: int = 64
    exact_bytes: int | None = None
    fidelity_every: int = 200
    allow_unproven_device: bool = False
    mode: Mode = Mode.SERVE

    def to_additional_config(self) -> dict[str, Any]:
        """The JSON-compatible form that :func:`parse_config` reads back."""
        plain = {
            "profile": str(self.profile) if self.profile else None,
            "digest": self.digest,
            "exempt_layers": sorted(self.exempt_layers) or None,
            "exact_first_tokens": self.exact_first_tokens,
            "exact_recent_tokens": self.exact_recent_tokens,
            "exact_bytes": self.exact_bytes,
            "fidelity_every": self.fidelity_every,
            "allow_unproven_device": self.allow_unproven_device or None,
            "mode": str(self.mode),
        }
        return {CONFIG_KEY: {key: value for key, value in plain.items() if value is not None}}


def parse_config(
    additional_config: Mapping[str, Any] | None, environment: Mapping[str, str] = os.environ
) -> SpectralConfig | None:
    """Our part of vLLM's ``additional_config``.

    Args:
        additional_config: what vLLM was given; may be empty.
        environment: where the kill switch is looked for.

    Returns:
        None if there is nothing for us or ``VLLM_SPECTRAL_DISABLE`` is set: stock vLLM then runs unchanged.

    Raises:
        ConfigError: for an unknown key or a value of the wrong kind.
    """
    section = additional_config.get(CONFIG_KEY) if isinstance(additional_config, Mapping) else None
    if section is None or environment.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return None
    if not isinstance(section, Mapping):
        raise ConfigError(f'additional_config["{CONFIG_KEY}"] must be an object, got {section!r}')
    known = {field.name for field in dataclasses.fields(SpectralConfig)}
    unknown = sorted(set(section) - known)
    if unknown:
        raise ConfigError(
            f'additional_config["{CONFIG_KEY}"] has unknown keys: {", ".join(unknown)} (known: {", ".join(sorted(known))})'
        )
    try:
        mode = Mode(section.get("mode", Mode.SERVE))
    except ValueError:
        raise ConfigError(f"spectral mode must be one of {', '.join(Mode)}, got {section['mode']!r}") from None
    profile, digest = section.get("profile"), section.get("digest")
    if not isinstance(profile, str | None) or not isinstance(digest, str | None):
        raise ConfigError("spectral profile and digest must be strings")
    if profile is None and mode is Mode.SERVE:
        raise ConfigError('spectral needs a profile: additional_config={"spectral": {"profile": PATH}}')
    exempt = section.get("exempt_layers", [])
    if not isinstance(exempt, list | tuple) or not all(isinstance(i, int) and i >= 0 for i in exempt):
        raise ConfigError(f"spectral exempt_layers must be a list of layer indices, got {exempt!r}")
    defaults = SpectralConfig()
    counts = {name: section.get(name, getattr(defaults, name)) for name in _COUNTS}
    for name, count in counts.items():
        if count is None and name == "exact_bytes":
            continue
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ConfigError(f"spectral {name} must be a whole number, 0 or more, got {count!r}")
    flags = {name: section.get(name, getattr(defaults, name)) for name in _FLAGS}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(f"spectral {name} must be true or false, got {flag!r}")
    return SpectralConfig(Path(profile) if profile else None, digest, frozenset(exempt), mode=mode, **counts, **flags)
