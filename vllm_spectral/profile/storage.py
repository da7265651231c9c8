"""Reading and writing profiles: safetensors, a versioned schema, a digest. Never pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vllm_spectral.codec.codebook import Codebooks
from vllm_spectral.errors import (
    ProfileDigestError,
    ProfileError,
    ProfileFormatError,
    ProfileMismatchError,
)
from vllm_spectral.models.description import ModelFingerprint
from vllm_spectral.profile.container import METADATA_KEY, brief, printable, read_profile_file
from vllm_spectral.profile.schema import (
    CANARY,
    CODEBOOKS,
    SCHEMA_VERSION,
    Expectation,
    LayerProfile,
    Profile,
    Provenance,
)
from vllm_spectral.profile.soundness import require_sound

_LAYER_FIELDS = tuple(field.name for field in dataclasses.fields(LayerProfile))


def save_profile(profile: Profile, path: Path) -> Profile:
    """Write a profile, atomically, and return it with its digest filled in.

    Raises:
        ProfileError: if the file cannot be written.
    """
    tensors = {CODEBOOKS: profile.codebooks.levels}
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
    if profile.expectation is not None:
        # Files without are older, or of profiles for which no model ran, and keep their digests.
        tensors[CANARY] = profile.expectation.figures.contiguous()
        header["canary_tokens"] = profile.expectation.tokens
    digest = _digest(header, tensors)
    metadata = {METADATA_KEY: json.dumps(header | {"digest": digest}, sort_keys=True)}
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
    try:
        printable(path.stem)
    except ValueError as error:
        raise ProfileError(f"cannot write the profile {path.stem!r}: it is named after its file, and {error}") from None
    if path.is_dir():
        raise ProfileError(f"cannot write the profile {path}: it is a directory")
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ProfileError(f"cannot write the profile {path}: {parent} is not a writable directory")


def load_profile(path: Path) -> Profile:
    """Read a profile and verify all of it: what loads could have been written by :func:`save_profile`, wherever it is from.

    Its tensors lie in memory of their own: the file may be replaced meanwhile.

    Raises:
        ProfileNotFoundError, ProfileFormatError, ProfileVersionError, ProfileDigestError, ProfileError: what each says.
    """
    raw, header, tensors = read_profile_file(path)
    shown = brief(path)
    stored = raw.pop("digest")
    if _digest(raw, tensors) != stored:
        raise ProfileDigestError(f"{shown} is corrupted or was changed: its content does not match its digest")
    # As it was written, now that it is checked: a number that was read as another type would be written as another profile.
    profile = Profile(
        name=header.name,
        fingerprint=ModelFingerprint(**raw["fingerprint"]),
        slot_bytes=header.slot_bytes,
        codebooks=Codebooks(tensors[CODEBOOKS]),
        layers=tuple(
            LayerProfile(**{name: tensors[f"layers.{index}.{name}"] for name in _LAYER_FIELDS})
            for index in range(header.num_layers)
        ),
        provenance=Provenance(**raw["provenance"]),
        expectation=Expectation(header.canary_tokens, tensors[CANARY]) if header.canary_tokens else None,
        digest=stored,
    )
    try:
        require_sound(profile)
    except ValueError as error:
        raise ProfileFormatError(f"{shown} is not a sound profile: {error}; calibrate again") from None
    return profile


def require_model(profile: Profile, fingerprint: ModelFingerprint, path: Path) -> None:
    """Raise :class:`ProfileMismatchError` unless the profile was made for this model."""
    differences = profile.fingerprint.differences(fingerprint)
    if differences:
        raise ProfileMismatchError(
            f"{path} was made for another model ({'; '.join(differences)}); calibrate this model to get its own profile"
        )


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Hex SHA-256 of the header without the creation date, and of every tensor's name, type, shape and bytes."""
    provenance = {key: value for key, value in header["provenance"].items() if key != "created"}
    digest = hashlib.sha256(json.dumps(header | {"provenance": provenance}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
