"""What several commands share."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spectral.models.demo import resolve_model
from vllm_spectral.models.description import ModelDescription

if TYPE_CHECKING:
    from vllm_spectral.profile.schema import Profile

MODEL_HELP = "model directory, hub name (owner/name), or 'demo'"


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """``--verbose``: show vLLM's own log."""
    parser.add_argument("--verbose", action="store_true", help="show vLLM's own log")


def quiet_vllm(verbose: bool) -> None:
    """Keep vLLM's start-up log away from offline commands; must run before vLLM is imported."""
    if not verbose:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Deprecations inside vLLM and torch are not for our users.
        warnings.simplefilter("ignore")


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
