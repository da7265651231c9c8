"""What the backend refuses before it touches a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_spectral.backend.impl import _refuse_draft_models, _refuse_sleep, _refuse_transfer
from vllm_spectral.errors import ConfigError


def config(method: str | None) -> Any:
    return SimpleNamespace(speculative_config=SimpleNamespace(method=method) if method else None)


@pytest.mark.parametrize("method", ["eagle", "eagle3", "draft_model", "mtp", "medusa", "ngram_gpu"])
def test_draft_models_are_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} brings a draft model.*ngram, suffix"):
        _refuse_draft_models(config(method))


@pytest.mark.parametrize("method", [None, "ngram", "suffix"])
def test_speculation_without_one_is_not(method: str | None) -> None:
    _refuse_draft_models(config(method))


def test_pages_that_others_bring_are_refused() -> None:
    _refuse_transfer(SimpleNamespace(kv_transfer_config=None))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no connector compares"):
        _refuse_transfer(SimpleNamespace(kv_transfer_config=object()))  # type: ignore[arg-type]


def test_sleep_mode_is_refused() -> None:
    _refuse_sleep(SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=False)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="enable_sleep_mode"):
        _refuse_sleep(SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True)))  # type: ignore[arg-type]
