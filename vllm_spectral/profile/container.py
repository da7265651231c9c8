"""A profile's file as untrusted input: nothing of it is believed, or read into memory, before it is checked.

A profile may come from anywhere, and whoever forged it can renew its digest. So the header is read first, alone and bounded;
it says which model the profile is for, and from that follow the name, type and shape of every tensor and the size of the
whole file. Only a file of exactly that size is read on, once, into memory of our own: a mapped file could be changed or
cut short under us later. What safetensors then parses has no room left for surprises.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from vllm_spectral.codec.codebook import MAX_BITS
from vllm_spectral.codec.layout import SLOT_ALIGNMENT, slot_bytes_for
from vllm_spectral.errors import ProfileError, ProfileFormatError, ProfileNotFoundError, ProfileVersionError
from vllm_spectral.models.known import SUPPORTED_HEAD_DIMS
from vllm_spectral.profile.schema import CANARY, CODEBOOKS, FIGURES, SCHEMA_VERSION, BasisKind, tensor_shapes

METADATA_KEY = "vllm_spectral"
MAX_PROFILE_BYTES = 4 << 30
"""Six times what 80 layers of 64 heads of 128 channels take, and few models have more."""
MAX_HEADER_BYTES = 4 << 20
"""The table of tensors takes about 1 KiB per layer."""
MAX_LAYERS = 2048
MAX_HEADS = 1024
MAX_TEXT = 4096
_Entry = tuple[str, tuple[int, ...]]
"""Type and shape of a tensor, as safetensors writes them."""
_TYPE_BYTES = {"F32": 4, "U8": 1}
_SHOWN = 300
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


def printable(text: str) -> str:
    """Pass text without control characters, surrogates and the like, which terminals, logs and JSON would suffer from.

    Raises:
        ValueError: for any other.
    """
    if not text.isprintable():
        raise ValueError("it has characters that cannot be printed")
    return text


def brief(text: object) -> str:
    """What a foreign file says, as one line that is safe to show."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


Text = Annotated[str, Field(max_length=MAX_TEXT), AfterValidator(printable)]
_HEX = "^[0-9a-f]{64}$"
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Fingerprint(BaseModel):
    model_config = _STRICT
    model_type: Text
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_kv_heads: int = Field(ge=1, le=MAX_HEADS)
    head_dim: int
    weights: Text


class _Provenance(BaseModel):
    model_config = _STRICT
    basis: BasisKind
    requested_bits: float = Field(ge=0, le=64, allow_inf_nan=False)
    text_source: Text
    num_tokens: int = Field(ge=0, lt=1 << 63)
    seed: int = Field(ge=-(1 << 63), lt=1 << 63)
    created: Text
    versions: dict[Text, Text] = Field(max_length=64)


class Header(BaseModel):
    """What a profile's file says beside its tensors: the fields of ``Profile``, and a digest over everything."""

    model_config = _STRICT
    schema_version: int
    name: Text
    fingerprint: _Fingerprint
    slot_bytes: int = Field(gt=0, multiple_of=SLOT_ALIGNMENT)
    num_layers: int
    provenance: _Provenance
    canary_tokens: str | None = Field(None, pattern=_HEX)
    digest: str = Field(pattern=_HEX)


def read_profile_file(path: Path) -> tuple[dict[str, Any], Header, dict[str, Tensor]]:
    """Read a profile's file; memory stays within about three times the size of the file.

    Returns:
        The header as it was written (that is what the digest covers), the same header checked, and the tensors: exactly those
        that a profile of such a model has, with the right types and shapes, of any content.

    Raises:
        ProfileNotFoundError, ProfileFormatError, ProfileVersionError, ProfileError: what each says.
    """
    shown = brief(path)
    try:
        with _opened(path, shown) as file:
            size = os.fstat(file.fileno()).st_size
            start = _read_start(file, size, shown)
            table, raw = _parse(start[8:], shown)
            header = _checked(raw, shown)
            expected = _expected(header)
            if problem := next(_differences(table, expected), None):
                raise ProfileFormatError(f"{shown} is not a complete profile: {problem}")
            total = len(start) + sum(_num_bytes(*entry) for entry in expected.values())
            if size != total:
                raise _truncated(shown, f"it has {size} bytes where {total} belong")
            file.seek(0)
            content = file.read(total)
    except OSError as error:
        raise ProfileError(f"cannot read the profile {shown}: {error.strerror or error}") from None
    if len(content) != total or not content.startswith(start):
        raise ProfileFormatError(f"{shown} was changed while it was read: try again")
    try:
        return raw, header, load(content)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _truncated(shown, brief(error)) from None


def _truncated(shown: str, reason: str) -> ProfileFormatError:
    return ProfileFormatError(f"{shown} is not a profile, or it is truncated: {reason}")


def _opened(path: Path, shown: str) -> BinaryIO:
    try:
        # Devices and pipes are not even opened: that alone may wait, or do something.
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path.stat() is the same
    except (FileNotFoundError, NotADirectoryError):
        raise ProfileNotFoundError(
            f"no such profile: {shown} (make one with: vllm-spectral calibrate MODEL -o {shown})"
        ) from None
    except ValueError as error:
        raise ProfileNotFoundError(f"no such profile: {shown} is no path ({error})") from None
    if stat.S_ISREG(mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        file = os.fdopen(descriptor, "rb")
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return file
        file.close()
    kind = _KINDS.get(stat.S_IFMT(mode), "something else")
    raise ProfileFormatError(f"{shown} is not a profile but {kind}")


def _read_start(file: BinaryIO, size: int, shown: str) -> bytes:
    """The length and the header, as they stand in the file."""
    if size > MAX_PROFILE_BYTES:
        raise ProfileFormatError(f"{shown} is not a profile: {size} bytes are more than any profile has")
    length = file.read(8)
    num_bytes = int.from_bytes(length, "little")
    if len(length) < 8 or num_bytes > size - 8:
        raise _truncated(shown, f"{size} bytes do not hold its header")
    if num_bytes > MAX_HEADER_BYTES:
        raise ProfileFormatError(f"{shown} is not a profile: its header of {num_bytes} bytes is too large")
    return length + file.read(num_bytes)


def _parse(text: bytes, shown: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The table of tensors, and our header, which stands in it as a string."""
    try:
        table = _json(text.decode())
    except (ValueError, RecursionError) as error:
        raise _truncated(shown, f"its header is not JSON ({brief(error)})") from None
    metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
    ours = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(ours, str):
        raise ProfileFormatError(f"{shown} is a safetensors file, but not a spectral profile")
    try:
        header = _json(ours)
    except (ValueError, RecursionError) as error:
        raise ProfileFormatError(f"{shown} is not a complete profile: {brief(error)}") from None
    if not isinstance(header, dict):
        raise ProfileFormatError(f"{shown} is not a complete profile: its header is no object")
    return table, header


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Two parsers may see different ones of two equal keys, and then check other values than are used.
        if len(result := dict(pairs)) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _checked(raw: dict[str, Any], shown: str) -> Header:
    version = raw.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ProfileVersionError(
            f"{shown} has schema version {brief(version)}, this release reads {SCHEMA_VERSION}; calibrate again"
        )
    try:
        header = Header.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = brief(".".join(map(str, first["loc"])))
        raise ProfileFormatError(f"{shown} is not a complete profile: {place}: {brief(first['msg'])}") from None
    model = header.fingerprint
    problem = None
    if header.num_layers != model.num_layers:
        problem = f"{header.num_layers} layers for a model of {model.num_layers}"
    elif model.head_dim not in SUPPORTED_HEAD_DIMS:
        problem = f"no supported model has head_dim {model.head_dim}"
    elif header.slot_bytes > slot_bytes_for(MAX_BITS, model.head_dim) + SLOT_ALIGNMENT:
        problem = f"slots of {header.slot_bytes} bytes are larger than {MAX_BITS} bits per element need"
    if problem:
        raise ProfileFormatError(f"{shown} is not a complete profile: {problem}")
    return header


def _expected(header: Header) -> dict[str, _Entry]:
    """Type and shape of every tensor, by name."""
    model = header.fingerprint
    shapes = tensor_shapes(model.num_kv_heads, model.head_dim)
    expected: dict[str, _Entry] = {CODEBOOKS: ("F32", (MAX_BITS + 1, 2**MAX_BITS))}
    if header.canary_tokens is not None:
        expected[CANARY] = ("F32", (model.num_layers, model.num_kv_heads, FIGURES))
    for index in range(model.num_layers):
        for name, shape in shapes.items():
            expected[f"layers.{index}.{name}"] = ("U8" if name.endswith("bits") else "F32", shape)
    return expected


def _num_bytes(kind: str, shape: tuple[int, ...]) -> int:
    return _TYPE_BYTES[kind] * math.prod(shape)


def _differences(table: dict[str, Any], expected: dict[str, _Entry]) -> Iterator[str]:
    for name, (kind, shape) in expected.items():
        entry = table.get(name)
        if not isinstance(entry, dict):
            yield f"it lacks the tensor {name}"
        elif entry.get("dtype") != kind:
            yield f"{name} has type {brief(entry.get('dtype'))} instead of {kind}"
        elif entry.get("shape") != list(shape):
            yield f"{name} has shape {brief(entry.get('shape'))} instead of {list(shape)}"
    for name in table.keys() - expected.keys():
        yield f"the tensor {brief(name)} does not belong into it"
