"""``/v1/kv_cache``: what the cache costs, what it does to answers, and what it was made from."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from safetensors.torch import save

from vllm_spectral.profile.report import summarize
from vllm_spectral.profile.schema import Profile
from vllm_spectral.stats.memory import LayerMemory
from vllm_spectral_server.monitor import LayerState, Monitor
from vllm_spectral_server.schemas import (
    CacheFidelity,
    CacheMemory,
    CacheProfile,
    CanaryState,
    FidelityPoint,
    LayerCost,
    LayerFidelity,
    LayerSpectrum,
    ProfileIdentity,
    RankMemory,
    Traffic,
)

router = APIRouter(prefix="/v1/kv_cache", tags=["kv cache"])


def monitor_of(request: Request) -> Monitor:
    """The application's monitor."""
    monitor: Monitor = request.app.state.spectral
    return monitor


Watching = Annotated[Monitor, Depends(monitor_of)]


def _served(monitor: Watching) -> Profile:
    if monitor.profile is None:
        raise HTTPException(404, "the stock cache is served: there is no profile")
    return monitor.profile


Served = Annotated[Profile, Depends(_served)]


@router.get("/memory")
async def memory(monitor: Watching) -> CacheMemory:
    """What the KV cache costs, and what bf16 and fp8 would have held in the same bytes."""
    report, profile = monitor.memory, monitor.profile
    return CacheMemory(
        model=monitor.model,
        profile=ProfileIdentity(digest=profile.digest, name=profile.name) if profile else None,
        layers=[_cost(layer) for layer in report.layers],
        ranks=[
            RankMemory(
                data_parallel_rank=engine.rank,
                tensor_parallel_rank=worker.rank,
                pool_bytes=worker.pool_bytes,
                allocated_bytes=worker.allocated_bytes,
                resident_page_bytes=worker.resident_page_bytes,
                exact_tier_bytes=worker.exact_tier_bytes,
                workspace_bytes=worker.workspace_bytes,
                profile_bytes=worker.profile_bytes,
                process_bytes=worker.process_bytes,
                layers=[_cost(layer) for layer in worker.layers],
            )
            for engine in report.engines
            for worker in engine.workers
        ],
        **{name: getattr(report, name) for name in _PLAIN},
    )


_PLAIN = CacheMemory.model_fields.keys() - {"model", "profile", "layers", "ranks"}


def _cost(layer: LayerMemory) -> LayerCost:
    return LayerCost(
        name=layer.name,
        slot_bytes=layer.slot_bytes,
        key_bits=layer.key_bits,
        value_bits=layer.value_bits,
        compressed=layer.compressed,
        page_bytes=layer.page_bytes,
        exact_tier_bytes=layer.exact_bytes,
        static_bytes=layer.static_bytes,
    )


@router.get("/fidelity")
async def fidelity(monitor: Watching) -> CacheFidelity:
    """What compression does to the answers: sampled from live steps, and from the canary."""
    return CacheFidelity(
        every_steps=monitor.every,
        sampled_steps=monitor.sampled_steps,
        sampling_seconds=monitor.sampling_seconds,
        drift_limit=monitor.limits.drift,
        error_ratio_limit=monitor.limits.error_ratio,
        alarms=monitor.alarms,
        canary=canary_state(monitor),
        layers=[_fidelity(state) for state in monitor.layers],
        history=[FidelityPoint.model_validate(entry) for entry in monitor.history],
    )


def _fidelity(state: LayerState) -> LayerFidelity:
    return LayerFidelity(
        layer=state.layer,
        samples=state.samples,
        time=state.time,
        output_error=state.figures.get("output_error"),
        attention_kl=state.figures.get("attention_kl"),
        error_ratio=state.error_ratio,
        kernel_error=state.kernel_error,
        fallback_share=state.figures.get("fallback_share"),
        clipped_share=state.figures.get("clipped_share"),
        key_drift=state.key_drift,
        value_drift=state.value_drift,
        drift=state.drift,
        moment_tokens=state.moment_tokens,
    )


def canary_state(monitor: Monitor) -> CanaryState:
    """The canary, as a body."""
    canary = monitor.canary
    layer = canary.worst_layer
    check = None if layer is None else canary.layers[layer]
    limits = canary.limits if layer is None else canary.limits_of(layer)
    return CanaryState(
        state=canary.state,
        time=canary.time,
        runs=canary.runs,
        failures=canary.failures,
        kl=canary.verdict.kl if canary.verdict else None,
        kl_limit=canary.limits.kl,
        top1_agreement=canary.verdict.top1 if canary.verdict else None,
        worst_layer=layer,
        worst_error_ratio=check.error_ratio if check else None,
        worst_drift=check.drift if check else None,
        error_ratio_limit=limits.error_ratio,
        drift_limit=limits.drift,
        message=canary.message,
    )


@router.get("/profile", responses={404: {"description": "the stock cache is served"}})
async def profile(served: Served) -> CacheProfile:
    """The active profile: where it comes from, its spectra and bits."""
    summary = dataclasses.asdict(summarize(served))
    layers = [
        LayerSpectrum(
            layer=facts.pop("index"),
            key_spectrum=_shares(layer.key_spectrum),
            value_spectrum=_shares(layer.value_spectrum),
            key_channel_bits=layer.key_bits.float().mean(0).tolist(),
            value_channel_bits=layer.value_bits.float().mean(0).tolist(),
            **facts,
        )
        for facts, layer in zip(summary.pop("layers"), served.layers, strict=True)
    ]
    return CacheProfile(layers=layers, **summary)


def _shares(spectrum: object) -> list[float]:
    import torch

    assert isinstance(spectrum, torch.Tensor)
    mean = spectrum.double().mean(0)
    shares: list[float] = (mean / mean.sum().clamp_min(1e-30)).tolist()
    return shares


@router.get(
    "/moments",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}, 404: {"description": "the stock cache is served"}},
)
async def moments(served: Served, monitor: Watching) -> Response:
    """Second moments of recent live keys, values and queries, a safetensors file: what ``calibrate --from-traffic`` reads.

    Sums over tokens, no text and no single vector.
    """
    about = {
        "profile": served.digest,
        "bits": str(served.provenance.requested_bits),
        "fingerprint": json.dumps(dataclasses.asdict(served.fingerprint)),
    }
    data = await asyncio.to_thread(save, await monitor.live_moments(), about)
    return Response(data, media_type="application/octet-stream")


@router.get("/traffic")
async def traffic(monitor: Watching) -> Traffic:
    """Requests and tokens."""
    view = monitor.view
    prompt, generated = view.tokens_per_second()
    return Traffic(
        time=time.time(),
        prompt_tokens_per_second=prompt,
        generated_tokens_per_second=generated,
        **{
            name: view.total(name)
            for name in ("running", "waiting", "prompt_tokens", "generated_tokens", "preemptions")
        },
    )
