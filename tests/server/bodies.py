"""Bodies of our routes, built by their models, for what reads them: the page and ``vllm-spectral top``."""

from __future__ import annotations

from typing import Any

from vllm_spectral_server.schemas import (
    Alarm,
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
    Readiness,
    Traffic,
)

LAYERS, HEADS, DIM, BLOCK = 30, 3, 64, 32
BYTES_PER_TOKEN, DENSE_BYTES_PER_TOKEN = 4320, 23040
EXACT, WORKSPACE, STATIC = 5_593_344, 3_407_872, 6_219_360
START = 1_780_000_000.0
"""Seconds since the epoch at which the pretended server was started."""


def memory(
    used_blocks: int = 120, cached_blocks: int = 300, *, num_blocks: int = 930, ranks: int = 1, stock: bool = False
) -> CacheMemory:
    """A cache of 128 MiB at 3 bits; with ``stock`` of bf16 pages."""
    per_token = DENSE_BYTES_PER_TOKEN if stock else BYTES_PER_TOKEN
    num_blocks = num_blocks * BYTES_PER_TOKEN // per_token
    used_blocks, cached_blocks = min(used_blocks, num_blocks), min(cached_blocks, num_blocks - used_blocks)
    page = BLOCK * per_token
    pool = num_blocks * page
    exact, workspace, static = (0, 0, 0) if stock else (EXACT, WORKSPACE, STATIC)
    resident = pool + exact + workspace + static
    dense = num_blocks * BLOCK * DENSE_BYTES_PER_TOKEN
    layers = [
        LayerCost(
            name=f"model.layers.{layer}.self_attn.attn", slot_bytes=per_token // LAYERS // HEADS,
            key_bits=16.0 if stock else 3.0, value_bits=16.0 if stock else 3.0, compressed=not stock,
            page_bytes=pool // LAYERS // ranks, exact_tier_bytes=exact // LAYERS // ranks,
            static_bytes=static // LAYERS // ranks,
        )
        for layer in range(LAYERS)
    ]  # fmt: skip
    return CacheMemory(
        model="demo",
        profile=None if stock else ProfileIdentity(digest="982b98757de7" + "0" * 52, name="spectral-3"),
        kernels="" if stock else "avx512bf16",
        num_blocks=num_blocks,
        block_size_tokens=BLOCK,
        pool_bytes=pool,
        used_bytes=used_blocks * page,
        cached_bytes=cached_blocks * page,
        free_bytes=(num_blocks - used_blocks - cached_blocks) * page,
        used_tokens=used_blocks * BLOCK,
        cached_tokens=cached_blocks * BLOCK,
        capacity_tokens=num_blocks * BLOCK,
        uncompressed_capacity_tokens=(pool + exact) // DENSE_BYTES_PER_TOKEN,
        fp8_capacity_tokens=2 * (pool + exact) // DENSE_BYTES_PER_TOKEN,
        bytes_per_token=per_token,
        uncompressed_bytes_per_token=DENSE_BYTES_PER_TOKEN,
        compression_ratio=DENSE_BYTES_PER_TOKEN / per_token,
        exact_tier_bytes=exact,
        exact_tier_used_bytes=exact // 3,
        workspace_bytes=workspace,
        profile_bytes=static,
        resident_bytes=resident,
        effective_compression_ratio=dense / resident,
        effective_bits_per_element=16 * resident / dense,
        layers=layers,
        ranks=[
            RankMemory(
                data_parallel_rank=0, tensor_parallel_rank=rank, pool_bytes=pool // ranks, allocated_bytes=pool // ranks,
                resident_page_bytes=pool // ranks // 2,
                exact_tier_bytes=exact // ranks, workspace_bytes=workspace // ranks, profile_bytes=static // ranks,
                process_bytes=1_234_567_890 + rank, layers=layers,
            )
            for rank in range(ranks)
        ],
    )  # fmt: skip


def canary(state: str = "passed", **changes: Any) -> CanaryState:
    """A canary; one that never ran has no figures."""
    ran = state in ("passed", "failed")
    return CanaryState.model_validate(
        {
            "state": state,
            "time": START + 600 if ran else None,
            "runs": 4 if ran else 0,
            "failures": 1 if state == "failed" else 0,
            "kl": (0.31 if state == "failed" else 0.0116) if ran else None,
            "kl_limit": 0.1,
            "top1_agreement": 0.953 if ran else None,
            "worst_layer": 17 if ran else None,
            "worst_error_ratio": 1.31 if ran else None,
            "worst_drift": 0.03 if ran else None,
            "error_ratio_limit": 2.0,
            "drift_limit": 0.08,
            "message": "KL 0.31 is above 0.1" if state == "failed" else "",
            **changes,
        }
    )


def figures(layer: int, step: int) -> tuple[float, float, float]:
    """Output error, KL and error ratio of a layer at a step: smooth, different in every layer, the same every time."""
    wave = 1 + 0.35 * ((layer * 7 + step * 3) % 11) / 11
    ratio = (2.6 if layer == 17 and step >= 40 else 0.9) * wave
    return 0.04 * (1 + layer / 12) * wave, 0.003 * (1 + (layer % 9) / 2) * wave, ratio


def fidelity(steps: int = 60, *, alarms: bool = True, stock: bool = False, sampling: bool = True) -> CacheFidelity:
    """``steps`` samples, ten seconds apart, of all layers; ``alarms`` puts layer 17 over the limit of the error ratio."""
    sampled = 0 if stock or not sampling else steps
    history = [
        FidelityPoint(time=START + 10 * step, layer=layer, output_error=error, attention_kl=kl, error_ratio=ratio)
        for step in range(sampled)
        for layer in range(LAYERS)
        for error, kl, ratio in [figures(layer, step)]
    ]
    layers = []
    for layer in range(0 if stock else LAYERS):
        error, kl, ratio = figures(layer, sampled - 1) if sampled else (None, None, None)
        layers.append(
            LayerFidelity(
                layer=layer, samples=sampled, time=START + 10 * (sampled - 1) if sampled else None, output_error=error,
                attention_kl=kl, error_ratio=ratio, fallback_share=0.021 if sampled else None,
                kernel_error=0.003 if sampled else None,
                clipped_share=0.004 if sampled else None, key_drift=0.013 + layer / 1000 if sampled else None,
                value_drift=0.008 if sampled else None, drift=0.013 + layer / 1000 if sampled else None,
                moment_tokens=64 * sampled,
            )
        )  # fmt: skip
    alarm = Alarm(kind="error", layer=17, value=2.84, limit=2.0, message="keys and values are restored badly")
    return CacheFidelity(
        every_steps=64 if sampling and not stock else 0,
        sampled_steps=sampled,
        sampling_seconds=0.02 * sampled,
        drift_limit=0.2,
        error_ratio_limit=2.0,
        alarms=[alarm] if alarms and sampled else [],
        canary=canary("off" if stock else "passed"),
        layers=layers,
        history=history,
    )


def profile() -> CacheProfile:
    """Spectra that fall off exponentially, and bits that fall off with them."""
    layers = []
    for layer in range(LAYERS):
        rates = 0.06 + layer / 400, 0.03 + layer / 900
        spectra = [[2.718 ** (-rate * channel) for channel in range(DIM)] for rate in rates]
        shares = [[value / sum(spectrum) for value in spectrum] for spectrum in spectra]
        bits = [[float(max(0, round(5.4 - rate * 1.1 * channel))) for channel in range(DIM)] for rate in rates]
        layers.append(
            LayerSpectrum(
                layer=layer, key_bits=sum(bits[0]) / DIM, value_bits=sum(bits[1]) / DIM,
                key_effective_rank=1 / sum(s * s for s in shares[0]),
                value_effective_rank=1 / sum(s * s for s in shares[1]), key_spectrum=shares[0],
                value_spectrum=shares[1], key_channel_bits=bits[0], value_channel_bits=bits[1],
            )
        )  # fmt: skip
    return CacheProfile(
        digest="982b98757de7" + "0" * 52,
        name="spectral-3",
        model={"model_type": "llama", "num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM},
        provenance={
            "basis": "spectral", "requested_bits": 3.0, "text_source": "built-in prompts", "num_tokens": 12276,
            "seed": 0, "created": "2026-01-01T00:00:00+00:00", "versions": {"torch": "2.13.0", "vllm": "0.32.0"},
        },
        bits_per_element=3.0,
        slot_bytes=48,
        bytes_per_token=BYTES_PER_TOKEN,
        uncompressed_bytes_per_token=DENSE_BYTES_PER_TOKEN,
        compression_ratio=DENSE_BYTES_PER_TOKEN / BYTES_PER_TOKEN,
        layers=layers,
    )  # fmt: skip


def traffic(running: int = 3, waiting: int = 1, rate: float = 41.5) -> Traffic:
    """An engine at work."""
    return Traffic(
        time=START + 700, running=running, waiting=waiting, prompt_tokens=123_456, generated_tokens=65_432,
        generated_tokens_per_second=rate, prompt_tokens_per_second=8 * rate, preemptions=2,
    )  # fmt: skip


def readiness(state: str = "passed") -> Readiness:
    """Ready unless the canary failed or has not run."""
    reasons = {"failed": "the canary failed", "pending": "the canary has not run yet"}
    return Readiness(ready=state not in reasons, reason=reasons.get(state, "ready"), canary=canary(state))


class Bodies:
    """What a pretended server answers, to be changed while it runs.

    Attributes:
        key: its API key, or None.
        answers: body by path without leading slash; a path that is not there is answered by 404.
        seen: paths asked for, in order.
    """

    def __init__(self, key: str | None = None, *, stock: bool = False, ranks: int = 1) -> None:
        self.key = key
        self.seen: list[str] = []
        self.answers: dict[str, Any] = {
            "ready": readiness("off" if stock else "passed"),
            "v1/kv_cache/memory": memory(stock=stock, ranks=ranks),
            "v1/kv_cache/fidelity": fidelity(stock=stock),
            "v1/kv_cache/traffic": traffic(),
        }
        if not stock:
            self.answers["v1/kv_cache/profile"] = profile()

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes]:
        """Status and JSON of a GET."""
        self.seen.append(path)
        if path.startswith("v1/") and self.key is not None and authorization != f"Bearer {self.key}":
            return 401, b'{"error": "Unauthorized"}'
        body = self.answers.get(path)
        if body is None:
            return 404, b'{"detail": "Not Found"}'
        return (503 if path == "ready" and not body.ready else 200), body.model_dump_json().encode()
