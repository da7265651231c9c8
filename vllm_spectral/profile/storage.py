"""Reading and writing profiles: safetensors, a versioned schema, a digest. Never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_spectral.codec.codebook import MAX_BITS, Codebooks
from vllm_spectral.errors import (
    ProfileDigestError,
    ProfileError,
    ProfileFormatError,
    ProfileMismatchError,
    ProfileNotFoundError,
    ProfileVersionError,
)
from vllm_spectral.models.description import ModelFingerprint
from vllm_spectral.profile.schema import SCHEMA_VERSION, LayerProfile, Profile, Provenance

_METADATA_KEY = "vllm_spectral"
_LAYER_FIELDS = tuple(field.name for field in dataclasses.fields(LayerProfile))


def save_profile(profile: Profile, path: Path) -> Profile:
    """Write a profile, atomically, and return it with its digest filled in.

    Raises:
        ProfileError: if the file cannot be written.
    """
    tensors = {"codebooks": profile.codebooks.levels}
    for index, layer in enumerate(profile.layers):
        tensors |= {f"layers.{index}.{name}": getattr(layer, name).contiguous() for name in _LAYER_FIELDS}
    header = {
        "schema_version": SCHEMA_VERSION,
        "name": profile.name,
        "fingerprint": dataclasses.asdict(profile.fingerprint),
        "slot_bytes": profile.slot_bytes,
        "num_layers": len(profile.layers),
        "provenance": dataclasses.asdict(profile.provenance),
    }
    digest = _digest(header, tensors)
    metadata = {_METADATA_KEY: json.dumps(header | {"digest": digest}, sort_keys=True)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
        try:
            save_file(tensors, staging, metadata=metadata)
            Path(staging).chmod(0o644)
            Path(staging).replace(path)
        finally:
            Path(staging).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise ProfileError(f"cannot write the profile {path}: {error}") from None
    return dataclasses.replace(profile, digest=digest)


def require_writable(path: Path) -> None:
    """Raise :class:`ProfileError` if a profile cannot be written there: better before the work than after."""
    parent = path.parent
    if path.is_dir():
        raise ProfileError(f"cannot write the profile {path}: it is a directory")
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ProfileError(f"cannot write the profile {path}: {parent} is not a writable directory")


def load_profile(path: Path) -> Profile:
    """Read a profile and verify its schema and its digest.

    Raises:
        ProfileNotFoundError, ProfileFormatError, ProfileVersionError, ProfileDigestError: what each says.
    """
    if not path.is_file():
        raise ProfileNotFoundError(f"no such profile: {path} (make one with: vllm-spectral calibrate MODEL -o {path})")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, struct.error) as error:
        raise ProfileFormatError(f"{path} is not a profile, or it is truncated: {error}") from None
    if metadata is None:
        raise ProfileFormatError(f"{path} is a safetensors file, but not a spectral profile")
    try:
        header: dict[str, Any] = json.loads(metadata)
        version = header["schema_version"]
        if version != SCHEMA_VERSION:
            raise ProfileVersionError(
                f"{path} has schema version {version}, this release reads {SCHEMA_VERSION}; calibrate again"
            )
        stored = header.pop("digest")
        if _digest(header, tensors) != stored:
            raise ProfileDigestError(f"{path} is corrupted or was changed: its content does not match its digest")
        profile = Profile(
            name=header["name"],
            fingerprint=ModelFingerprint(**header["fingerprint"]),
            slot_bytes=header["slot_bytes"],
            codebooks=Codebooks(tensors["codebooks"]),
            layers=tuple(
                LayerProfile(**{name: tensors[f"layers.{index}.{name}"] for name in _LAYER_FIELDS})
                for index in range(header["num_layers"])
            ),
            provenance=Provenance(**header["provenance"]),
            digest=stored,
        )
        _check_shapes(profile)
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileFormatError(f"{path} is not a complete profile: {type(error).__name__}: {error}") from None
    return profile


def require_model(profile: Profile, fingerprint: ModelFingerprint, path: Path) -> None:
    """Raise :class:`ProfileMismatchError` unless the profile was made for this model."""
    differences = profile.fingerprint.differences(fingerprint)
    if differences:
        raise ProfileMismatchError(
            f"{path} was made for another model ({'; '.join(differences)}); calibrate this model to get its own profile"
        )


def _check_shapes(profile: Profile) -> None:
    model = profile.fingerprint
    vector = (model.num_kv_heads, model.head_dim)
    matrix = (*vector, model.head_dim)
    if len(profile.layers) != model.num_layers:
        raise ValueError(f"{len(profile.layers)} layers for a model of {model.num_layers}")
    if tuple(profile.codebooks.levels.shape) != (MAX_BITS + 1, 2**MAX_BITS):
        raise ValueError(f"codebooks have shape {tuple(profile.codebooks.levels.shape)}")
    for index, layer in enumerate(profile.layers):
        for name in _LAYER_FIELDS:
            shape = tuple(getattr(layer, name).shape)
            if shape != (matrix if name.endswith("basis") else vector):
                raise ValueError(f"layer {index}: {name} has shape {shape}")


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 of the header without the creation date, and of every tensor's name, type, shape and bytes."""
    provenance = {key: value for key, value in header["provenance"].items() if key != "created"}
    digest = hashlib.sha256(json.dumps(header | {"provenance": provenance}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
