"""What several commands share."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spectral.config import SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.models.demo import resolve_model
from vllm_spectral.models.description import ModelDescription

if TYPE_CHECKING:
    from vllm_spectral.profile.schema import Profile

MODEL_HELP = "model directory, hub name (owner/name), or 'demo'"


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """``--verbose``: show vLLM's own log."""
    parser.add_argument("--verbose", action="store_true", help="show vLLM's own log")


def add_exact(parser: argparse.ArgumentParser) -> None:
    """The exact tier's flags."""
    defaults = SpectralConfig()
    group = parser.add_argument_group(
        "exact tier", "tokens of every request that are read uncompressed, from a pool beside the compressed pages"
    )
    group.add_argument(
        "--exact-first-tokens", metavar="N", type=count, default=defaults.exact_first_tokens,
        help="the request's first tokens (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--exact-recent-tokens", metavar="N", type=count, default=defaults.exact_recent_tokens,
        help="its most recent tokens (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--exact-memory-bytes", metavar="SIZE", type=size, default=None,
        help="size of the pool per worker, taken out of the cache's memory; 64M, 1.5G, ...; 0: no exact tier "
        "(what --max-num-seqs requests need, at most a 24th of the cache's memory)",
    )  # fmt: skip


def add_exempt(parser: argparse.ArgumentParser) -> None:
    """``--exempt-layers``."""
    parser.add_argument(
        "--exempt-layers", metavar="N", type=int, nargs="+", default=[], help="layers to leave uncompressed"
    )


def exempt_layers(args: argparse.Namespace, model: ModelDescription) -> frozenset[int]:
    """The layers of ``--exempt-layers``.

    Raises:
        ConfigError: if the model does not have one of them.
    """
    outside = [layer for layer in args.exempt_layers if not 0 <= layer < model.num_layers]
    if outside:
        raise ConfigError(f"--exempt-layers {outside} do not exist: the model has layers 0 to {model.num_layers - 1}")
    return frozenset(args.exempt_layers)


def for_workers(path: Path) -> Path:
    """An absolute path, since workers may run elsewhere; symbolic links are kept."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def exact_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The exact tier's fields of :class:`SpectralConfig`."""
    return {
        "exact_first_tokens": args.exact_first_tokens,
        "exact_recent_tokens": args.exact_recent_tokens,
        "exact_bytes": args.exact_memory_bytes,
    }


def count(text: str) -> int:
    """A whole number of 0 or more, for argparse."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


count.__name__ = "whole number"


def number(text: str) -> float:
    """A finite number of 0 or more, for argparse."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value


number.__name__ = "number of 0 or more"


def size(text: str) -> int:
    """Bytes, as ``64M`` or ``1.5G``, for argparse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


size.__name__ = "size in bytes"


def quiet_vllm(verbose: bool) -> None:
    """Keep vLLM's start-up log away from offline commands; must run before vLLM is imported."""
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # For the processes started from here on.
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        # Deprecations inside vLLM and torch are not for our users.
        warnings.simplefilter("ignore")


def warn(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"vllm-spectral: warning: {message}\n")


def load_for(model: ModelDescription, path: Path) -> Profile:
    """A verified profile that belongs to the model."""
    from vllm_spectral.profile.storage import load_profile, require_model

    profile = load_profile(path)
    require_model(profile, model.fingerprint(), path)
    return profile


def described(model: str) -> ModelDescription:
    """Description of a MODEL argument."""
    return ModelDescription.from_directory(resolve_model(model))


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")
