"""Moments from a running server instead of a calibration run: for the traffic that it really serves."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from vllm_spectral.errors import ConfigError
from vllm_spectral.models.description import ModelDescription, ModelFingerprint
from vllm_spectral.remote import NoRedirects
from vllm_spectral.stats.moments import LayerMoments

LEAST_TOKENS = 2048
"""Fewer tokens than this per layer do not determine a spectrum of 64 or 128 channels well."""
_SECONDS = 60


@dataclass(frozen=True)
class LiveMoments:
    """What a server gathered.

    Attributes:
        layers: one entry per layer of the model.
        bits: of the profile that it serves.
    """

    layers: list[LayerMoments]
    bits: float


def traffic_moments(url: str, key: str | None, model: ModelDescription) -> LiveMoments:
    """What a server gathered.

    Args:
        url: the server's address, with the path prefix if it has one.
        key: its API key.
        model: the model that it must be serving.

    Raises:
        ConfigError: if there is no such server, it refuses, serves another model, or has seen too little.
    """
    address = url.rstrip("/") + "/v1/kv_cache/moments"
    wanted = LayerMoments(model.num_kv_heads, model.head_dim).to_tensors()
    # Counts and names take next to nothing; whoever answers with more than twice the sums answers with something else.
    most = 2 * model.num_layers * sum(t.nbytes for t in wanted.values())
    data = _fetch(address, key, most)
    try:
        tensors = load(data)
        # Eight bytes of length, then the header with the server's remarks.
        about = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        bits = float(about["bits"])
        served = ModelFingerprint(**json.loads(about["fingerprint"]))
        by_layer = _by_layer(tensors)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{address} did not answer with moments: {error}") from None
    if different := model.fingerprint().differences(served):
        raise ConfigError(f"{url} serves another model than the one named here: {'; '.join(different)}")
    if sorted(by_layer) != list(range(model.num_layers)):
        raise ConfigError(
            f"{url} measures {len(by_layer)} layers, the model has {model.num_layers}: it exempts the others"
        )
    for layer, fields in by_layer.items():
        if not _fits(fields, wanted):
            raise ConfigError(f"{address} did not answer with moments of this model: layer {layer} has other fields")
    layers = [LayerMoments.from_tensors(by_layer[index]) for index in range(model.num_layers)]
    tokens = min(layer.num_measured for layer in layers)
    if tokens < LEAST_TOKENS:
        raise ConfigError(
            f"{url} has measured {tokens} tokens so far, {LEAST_TOKENS} are needed: wait for more traffic, or serve with a "
            "smaller --fidelity-every"
        )
    return LiveMoments(layers, bits)


def _by_layer(tensors: dict[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, field = name.split(".")
        found.setdefault(int(layer), {})[field] = tensor
    return found


def _fits(fields: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether a layer has the fields that it should have, of finite numbers."""
    return fields.keys() == wanted.keys() and all(
        (fields[name].dtype, fields[name].shape) == (like.dtype, like.shape) and bool(fields[name].isfinite().all())
        for name, like in wanted.items()
    )


def _fetch(address: str, key: str | None, most: int) -> bytes:
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--from-traffic needs the address of a server, such as http://localhost:8000, not {address!r}"
        )
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.build_opener(NoRedirects).open(request, timeout=_SECONDS) as response:
            data: bytes = response.read(most + 1)
    except urllib.error.HTTPError as error:
        reasons = {401: "it needs --api-key", 404: "it is no vllm-spectral server, or serves the stock cache"}
        raise ConfigError(f"{address} answered {error.code}: {reasons.get(error.code, error.reason)}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ConfigError(f"cannot reach {address}: {getattr(error, 'reason', error)}") from None
    if len(data) > most:
        raise ConfigError(f"{address} did not answer with moments of this model: it sends more than {most} bytes")
    return data
