"""Shared fixtures. Pure tests build their own small data; tests of the engine share one calibration."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, settings

from vllm_spectral.calibration.allocate import spectral_layer
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.layout import slot_bytes_for
from vllm_spectral.models.description import ModelFingerprint
from vllm_spectral.profile.schema import LayerProfile, Profile, Provenance
from vllm_spectral.stats.moments import LayerMoments

# The machine may be slow and shared: time is never what a property test measures.
settings.register_profile("default", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

HEADS, DIM, LAYERS = 3, 64, 2


def correlated(num_tokens: int, seed: int, heads: int = HEADS, dim: int = DIM) -> torch.Tensor:
    """``[num_tokens, heads, dim]`` normal vectors whose energy sits in few, rotated directions."""
    fixed = torch.Generator().manual_seed(1234)
    mixing = torch.linalg.qr(torch.randn(heads, dim, dim, generator=fixed)).Q * torch.logspace(0.5, -1.5, dim)
    draw = torch.randn(num_tokens, heads, dim, generator=torch.Generator().manual_seed(seed))
    return torch.einsum("thd,hed->the", draw, mixing)


def measured(num_tokens: int = 4000, seed: int = 0) -> LayerMoments:
    """Moments of correlated keys and values and white queries."""
    moments = LayerMoments(HEADS, DIM)
    query = torch.randn(num_tokens, 3 * HEADS, DIM, generator=torch.Generator().manual_seed(seed + 9))
    positions = torch.arange(num_tokens) % 500
    moments.add(query, correlated(num_tokens, seed), correlated(num_tokens, seed + 1), positions)
    return moments


def pytest_configure() -> None:
    """Each of several test processes keeps to cores of its own, and so does all that it starts.

    Two OpenMP teams on the same cores would mostly wait for each other.
    """
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores, count = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: count])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of several test processes one has the shared server, another the engines that come one by one; all share the rest."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            folder = str(Path(nodeid.partition("::")[0]).parent)
            return folder if folder.startswith("tests/engine") else nodeid

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a command sets for the processes it will start, such as vLLM's log level, ends with the test that ran it."""
    with patch.dict(os.environ):
        yield


@pytest.fixture(scope="session")
def layer() -> LayerProfile:
    """A layer profile at 4 bits, measured on correlated data."""
    return spectral_layer(measured(), slot_bytes_for(4.0, DIM))


@pytest.fixture(scope="session")
def profile(layer: LayerProfile) -> Profile:
    """A small profile that belongs to no real model."""
    return Profile(
        name="small",
        fingerprint=ModelFingerprint("test", LAYERS, HEADS, DIM, "0" * 32),
        slot_bytes=slot_bytes_for(4.0, DIM),
        codebooks=Codebooks(normal_codebooks()),
        layers=tuple(LayerProfile(**{k: t.clone() for k, t in vars(layer).items()}) for _ in range(LAYERS)),
        provenance=Provenance("spectral", 4.0, "none", 4000, 0, "2026-01-01T00:00:00+00:00", {}),
    )
