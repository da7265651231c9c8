"""Whether a model can be served from spectral pages, decided from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vllm_spectral.errors import UnsupportedModelError
from vllm_spectral.models.decoder import Decoder
from vllm_spectral.models.evidence import active, shown
from vllm_spectral.models.known import READ_TYPES, RUN_TYPES
from vllm_spectral.models.rules import RULES, UNKNOWN

KEY_BIAS_NOTE = "keys have biases: only the weights show whether some layers are better left exact"


class Verdict(StrEnum):
    """What can be done with a model."""

    SUPPORTED = "supported"
    SUPPORTED_WITH_EXEMPT_LAYERS = "supported_with_exempt_layers"
    """Served, but some layers are better left on stock pages."""
    REFUSED = "refused"


@dataclass(frozen=True)
class Support:
    """The verdict on a model.

    Attributes:
        verdict: the verdict.
        reasons: why the model is refused, or why layers should be left exact; empty if it is simply supported.
        notes: what else a user should know.
        exempt_layers: layers to leave on stock pages.
    """

    verdict: Verdict
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    exempt_layers: tuple[int, ...] = ()

    def require_served(self, path: Path) -> None:
        """Raise :class:`UnsupportedModelError`, naming every obstacle, if the model in ``path`` is refused."""
        if self.verdict is Verdict.REFUSED:
            raise UnsupportedModelError(f"{path} cannot be served from spectral pages: " + "; ".join(self.reasons))


def assess(decoder: Decoder) -> Support:
    """The verdict that the configuration alone allows."""
    reasons = tuple(line for rule in RULES if (line := rule.applies(decoder)))
    if not reasons and (unknown := UNKNOWN.applies(decoder)):
        reasons = (unknown,)
    if reasons:
        return Support(Verdict.REFUSED, reasons)
    return Support(Verdict.SUPPORTED, notes=tuple(_notes(decoder)))


def _notes(decoder: Decoder) -> list[str]:
    """What a user of a supported model should know."""
    found = []
    kind = decoder.model_type
    if kind in RUN_TYPES:
        found.append(f"model type {kind} was run, with {RUN_TYPES[kind]}")
    elif kind in READ_TYPES:
        found.append(f"model type {kind} was never run here; its attention in vLLM 0.32 is plain")
    else:
        found.append(
            f"model type {kind} is not known here and was never run; its config.json looks like a plain decoder"
        )
    if decoder.section:
        found.append(f"{decoder.section} was judged; calibration measures text alone, no images or sound")
    if active(window := decoder.fields.get("sliding_window")):
        found.append(f"sliding_window {window} acts in no layer")
    if rotary := _partial_rotary(decoder):
        found.append(
            f"partial rotary embedding ({rotary}): calibration measures keys as they are stored, so this is fine"
        )
    if scale := next((f for f in ("attention_multiplier", "query_pre_attn_scalar") if active(decoder.get(f))), None):
        found.append(
            f"{scale}: calibration weighs keys against values by the usual 1/sqrt(head_dim), not by this scale"
        )
    if active(decoder.whole("quantization_config")):
        found.append("quantized weights: the profile belongs to this checkpoint, not to the unquantized one")
    if _has_key_biases(decoder):
        found.append(KEY_BIAS_NOTE)
    return found


def _partial_rotary(decoder: Decoder) -> str | None:
    nested = decoder.get("rope_parameters")
    values = (
        {"rope_parameters.partial_rotary_factor": nested.get("partial_rotary_factor")}
        if isinstance(nested, dict)
        else {}
    )
    values |= {name: decoder.get(name) for name in ("partial_rotary_factor", "rotary_pct", "rotary_dim")}
    return next((shown(name, value) for name, value in values.items() if value not in (None, 1, 1.0)), None)


def _has_key_biases(decoder: Decoder) -> bool:
    """Types whose keys always have a bias, and fields that say so."""
    flags = ("attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias")
    always = decoder.model_type.startswith("qwen2") or decoder.model_type in {"gpt2", "opt", "phi", "gpt_neox"}
    return always or any(decoder.get(flag) is True for flag in flags)
