"""``calibrate --from-traffic``: what a server answers is looked at before it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.conftest import DIM, HEADS, LAYERS, measured
from vllm_spectral.calibration.run import CalibrationRequest, calibrate
from vllm_spectral.calibration.traffic import traffic_moments
from vllm_spectral.codec.layout import slot_bytes_for
from vllm_spectral.errors import ConfigError
from vllm_spectral.models.description import ModelFingerprint

PRINT = ModelFingerprint("test", LAYERS, HEADS, DIM, "0" * 32)
MODEL: Any = SimpleNamespace(
    num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, fingerprint=lambda: PRINT, require_supported=lambda: None
)


@lru_cache(maxsize=1)
def sound() -> dict[str, torch.Tensor]:
    return {f"{layer}.{name}": t for layer in range(LAYERS) for name, t in measured().to_tensors().items()}


def packed(tensors: dict[str, torch.Tensor]) -> bytes:
    return save(tensors, {"bits": "3.0", "fingerprint": json.dumps(dataclasses.asdict(PRINT))})


@pytest.fixture
def answering() -> Iterator[Any]:
    """``answering(content)``: the address of a server that answers everything with it."""

    class Handler(BaseHTTPRequestHandler):
        content = b""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(self.content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def start(content: bytes) -> str:
        Handler.content = content
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    server.shutdown()


def test_moments_are_taken(answering: Any) -> None:
    live = traffic_moments(answering(packed(sound())), None, MODEL)
    assert len(live.layers) == LAYERS
    assert torch.equal(live.layers[0].keys, measured().keys)
    assert live.bits == 3.0


@pytest.mark.parametrize(("asked", "made"), [(None, 3.0), (4.0, 4.0)])
def test_the_new_profile_has_the_bits_of_the_served_one_unless_others_are_asked_for(
    answering: Any, asked: float | None, made: float
) -> None:
    url = answering(packed(sound()))
    profile = calibrate(CalibrationRequest(MODEL, "new", asked, traffic=url))
    assert profile.provenance.requested_bits == made
    assert profile.slot_bytes == slot_bytes_for(made, DIM)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"0.keys": torch.zeros(HEADS, DIM, dtype=torch.float64)}, "layer 0 has other fields"),
        ({"1.keys": torch.full((HEADS, DIM, DIM), torch.nan, dtype=torch.float64)}, "layer 1 has other fields"),
        ({"1.queries": torch.zeros(HEADS, DIM, DIM)}, "layer 1 has other fields"),
        ({"0.num_tokens": torch.zeros(2, dtype=torch.int64)}, "layer 0 has other fields"),
        ({"0.more": torch.zeros(1)}, "layer 0 has other fields"),
        ({"x": torch.zeros(1)}, "did not answer with moments"),
        ({"y.keys": torch.zeros(1)}, "did not answer with moments"),
        ({"9.keys": torch.zeros(1)}, "measures 3 layers"),
        ({"0.keys": torch.zeros(1 << 21)}, "sends more than"),
    ],
)
def test_other_answers_are_refused(answering: Any, change: dict[str, torch.Tensor], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        traffic_moments(answering(packed(sound() | change)), None, MODEL)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"x" * (64 << 20)])
def test_what_is_no_file_is_refused(answering: Any, content: bytes) -> None:
    with pytest.raises(ConfigError, match="did not answer with moments"):
        traffic_moments(answering(content), None, MODEL)
