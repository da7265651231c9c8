"""Hostile profile files, as hypothesis strategies: a sound file, taken apart, damaged in its structure and put together."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hypothesis import strategies as st

from vllm_spectral.calibration.allocate import hadamard_layer, spectral_layer
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.codec.layout import slot_bytes_for
from vllm_spectral.models.description import ModelFingerprint
from vllm_spectral.profile.container import METADATA_KEY
from vllm_spectral.profile.schema import FIGURES, Expectation, Profile, Provenance
from vllm_spectral.profile.storage import _digest, save_profile
from vllm_spectral.stats.moments import LayerMoments

HEADS, DIM, LAYERS = 2, 32, 2
TYPES = {"F32": torch.float32, "U8": torch.uint8}


@lru_cache(maxsize=1)
def original() -> Profile:
    """A small sound profile: one layer measured, one not."""
    generator = torch.Generator().manual_seed(0)
    falling = torch.randn(2000, HEADS, DIM, generator=generator) * torch.logspace(0.5, -1.5, DIM)
    moments = LayerMoments(HEADS, DIM)
    moments.add(falling, falling, falling.flip(0), torch.arange(2000) % 500)
    slot = slot_bytes_for(3.0, DIM)
    return Profile(
        "small", ModelFingerprint("test", LAYERS, HEADS, DIM, "0" * 32), slot, Codebooks(normal_codebooks()),
        (spectral_layer(moments, slot), hadamard_layer(HEADS, DIM, slot, 0)),
        Provenance("spectral", 3.0, "none", 2000, 0, "2026-01-01T00:00:00+00:00", {"torch": "2"}),
        Expectation("5e" * 32, torch.rand(LAYERS, HEADS, FIGURES, generator=generator)),
    )  # fmt: skip


@lru_cache(maxsize=1)
def original_bytes() -> bytes:
    """The file of :func:`original`."""
    with TemporaryDirectory() as folder:
        save_profile(original(), Path(folder) / "p")
        return (Path(folder) / "p").read_bytes()


@dataclass
class Forged:
    """A file in parts, each of which may lie about the others.

    Attributes:
        table: entries of the safetensors header.
        header: our own header in it.
        data: bytes of the tensors.
        length: what the file says of its header's length; None: the truth.
        table_text, header_text: written in place of the two.
        renew: write a digest that fits, so that what stands behind it is reached.
        steps: what was done, for people.
    """

    table: dict[str, Any]
    header: Any
    data: bytearray
    length: int | None = None
    table_text: str | None = None
    header_text: str | None = None
    renew: bool = True
    steps: list[str] = field(default_factory=list)

    @classmethod
    def sound(cls) -> Forged:
        """Nothing forged yet."""
        content = original_bytes()
        size = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + size])
        header = json.loads(table.pop("__metadata__")[METADATA_KEY])
        return cls(table, header, bytearray(content[8 + size :]))

    def assemble(self) -> bytes:
        """The file."""
        if self.renew and isinstance(self.header, dict) and self.header_text is None:
            self._renew()
        ours = json.dumps(self.header) if self.header_text is None else self.header_text
        text = self.table_text
        if text is None:
            text = json.dumps({"__metadata__": {METADATA_KEY: ours}} | self.table)
        start = text.encode("utf-8", "surrogatepass")
        start += b" " * (-len(start) % 8)
        length = len(start) if self.length is None else self.length
        return length.to_bytes(8, "little") + start + bytes(self.data)

    def _renew(self) -> None:
        try:
            tensors = {
                name: torch.frombuffer(
                    bytearray(self.data[slice(*entry["data_offsets"])]), dtype=TYPES[entry["dtype"]]
                ).view(entry["shape"])
                for name, entry in self.table.items()
            }
            content = {key: value for key, value in self.header.items() if key != "digest"}
            self.header["digest"] = _digest(content, tensors)
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError):
            pass  # no digest is right for what cannot be read

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, writable in place."""
        entry = self.table[name]
        count = math.prod(entry["shape"])
        return torch.frombuffer(
            self.data, dtype=TYPES[entry["dtype"]], count=count, offset=entry["data_offsets"][0]
        ).view(entry["shape"])


HUGE = st.sampled_from(
    [0, -1, 1, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30]
)
TEXTS = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["../../etc/passwd", "/etc/shadow", "a\x00b", "\x1b]0;owned\x07\x1b[2J", "[/bold]", "[link=x]", "$\\frac{", "\ud800",
         "\u202e",
         "<script>alert(1)</script>", "{}{0}%s%n", "\n\nTraceback", "x" * 5000, "é" * 100_000, "1e999", "__class__",
         "layers.0.key_basis"]
    ),
)  # fmt: skip
MARKUP = st.sampled_from(
    ["[/bold]", "[link=x]y", "$\\frac{$", "<img src=x onerror=alert(1)>", "{}{0}%s%n", "${PATH}", "`id`"]
)
"""Printable, and yet something to whoever shows it."""
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), HUGE, st.floats(), TEXTS, st.just([]), st.just({}),
    st.sampled_from([[1] * 1000, {"a": {"b": {}}}, "9" * 5000]),
)  # fmt: skip
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
DTYPES = st.sampled_from(
    ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "C64",
     "F4", "",
     "f32", "X", 3, None, ["F32"]]
)  # fmt: skip
NUMBERS = st.sampled_from(
    [math.nan, math.inf, -math.inf, -0.0, -1.0, 1e-45, 1e-38, 3.4e38, -3.4e38, 1e18, 2e18, 1e30, 0.0, 1.0, 100.0]
)
DEEP = st.sampled_from([10, 100, 990, 1000, 5000, 200_000])


def _deep(draw: Any) -> str:
    depth, (opening, closing) = draw(DEEP), draw(st.sampled_from([("[", "]"), ('{"a":', "}")]))
    return opening * depth + draw(st.sampled_from(["", "1"])) + closing * draw(st.sampled_from([depth, 0]))


def _damage_bytes(draw: Any, forged: Forged) -> str:
    if not (size := len(forged.data)):
        return "no bytes left"
    where = draw(st.integers(0, size - 1))
    kind = draw(st.sampled_from(["flip", "cut", "grow", "zero", "repeat", "drop"]))
    if kind == "flip":
        for place in [where, *draw(st.lists(st.integers(0, size - 1), max_size=8))]:
            forged.data[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del forged.data[where:]
    elif kind == "grow":
        forged.data += b"\0" * draw(st.sampled_from([1, 4, 8, 4096, 1 << 20]))
    elif kind == "zero":
        end = min(where + draw(st.integers(1, 5000)), size)
        forged.data[where:end] = b"\0" * (end - where)
    elif kind == "repeat":
        forged.data[where:where] = forged.data[where : where + 64]
    else:
        del forged.data[where : where + draw(st.integers(1, 64))]
    return f"{kind} at {where}"


def _damage_length(draw: Any, forged: Forged) -> str:
    truth = len(forged.assemble()) - 8 - len(forged.data)
    forged.length = draw(
        st.one_of(HUGE.filter(lambda n: 0 <= n < 2**64), st.integers(truth - 20, truth + 20), st.just(100_000_001))
    )
    return f"length {forged.length} of {truth}"


def _damage_table(draw: Any, forged: Forged) -> str:
    if not forged.table:
        return "no table left"
    name = draw(st.sampled_from(sorted(forged.table)))
    entry = forged.table[name]
    kind = draw(
        st.sampled_from(["dtype", "shape", "offsets", "swap", "drop", "rename", "add", "entry", "twice", "overlap"])
    )
    if not isinstance(entry, dict):
        kind = "drop"
    if kind == "dtype":
        entry["dtype"] = draw(DTYPES)
    elif kind == "shape":
        entry["shape"] = draw(
            st.one_of(
                st.lists(HUGE, max_size=4), st.permutations(entry.get("shape") or [1]), JSON,
                st.just([2**32, 2**32]), st.just([0]), st.just([]), st.just([2**20, 2**20, 2**20]),
            )
        )  # fmt: skip
    elif kind == "offsets":
        entry["data_offsets"] = draw(
            st.one_of(
                st.lists(HUGE, min_size=2, max_size=2), st.lists(st.integers(0, len(forged.data) * 2), max_size=3), JSON
            )
        )
    elif kind in ("swap", "overlap"):
        other = forged.table[draw(st.sampled_from(sorted(forged.table)))]
        if isinstance(other, dict):
            mine, theirs = entry.get("data_offsets"), other.get("data_offsets")
            entry["data_offsets"] = theirs
            if kind == "swap":
                other["data_offsets"] = mine
    elif kind == "drop":
        del forged.table[name]
    elif kind == "rename":
        forged.table[draw(TEXTS)] = forged.table.pop(name)
    elif kind == "add":
        forged.table[draw(TEXTS)] = draw(st.one_of(JSON, st.just(dict(entry))))
    elif kind == "entry":
        forged.table[name] = draw(JSON)
    else:
        text = json.dumps({"__metadata__": {METADATA_KEY: json.dumps(forged.header)}} | forged.table)
        forged.table_text = text[:-1] + f', "{name}": {json.dumps(draw(JSON))}}}'
    return f"table: {kind} {name}"


def _damage_header(draw: Any, forged: Forged) -> str:
    kind = draw(
        st.sampled_from(["set", "set", "set", "drop", "add", "whole", "text", "deep", "twice", "inner", "inner"])
    )
    if not isinstance(forged.header, dict) or not forged.header:
        kind = "text"
    place = forged.header
    if kind in ("set", "drop", "inner"):
        if (
            kind == "inner"
            and isinstance(inner := place.get(draw(st.sampled_from(["fingerprint", "provenance"]))), dict)
            and inner
        ):
            place = inner
        name = draw(st.sampled_from(sorted(place)))
        if kind == "drop":
            del place[name]
        else:
            place[name] = draw(st.one_of(JSON, HUGE, TEXTS))
        return f"header: {kind} {name}"
    if kind == "add":
        place[draw(TEXTS)] = draw(JSON)
    elif kind == "whole":
        forged.header = draw(JSON)
    elif kind == "text":
        forged.header_text = draw(TEXTS)
    elif kind == "deep":
        if draw(st.booleans()):
            forged.header_text = '{"schema_version": ' + _deep(draw) + "}"
        else:
            forged.table_text = '{"__metadata__": ' + _deep(draw) + "}"
    else:
        forged.header_text = json.dumps(forged.header)[:-1] + ', "num_layers": 1}'
    return f"header: {kind}"


def _damage_values(draw: Any, forged: Forged) -> str:
    if not forged.table:
        return "no table left"
    name = draw(st.sampled_from(sorted(forged.table)))
    try:
        tensor = forged.tensor(name).view(-1)
    except (LookupError, TypeError, ValueError, RuntimeError):
        return "values: none left"
    if not tensor.numel():
        return "values: none left"
    first = draw(st.integers(0, tensor.numel() - 1))
    count = draw(st.sampled_from([1, 2, 32, tensor.numel()]))
    part = tensor[first : first + count]
    if tensor.dtype == torch.uint8:
        value = draw(st.sampled_from([0, 1, 2, 7, 8, 9, 127, 128, 255]))
        part.fill_(value)
    else:
        value = draw(NUMBERS)
        if draw(st.booleans()):
            part.fill_(value)
        else:
            part.mul_(value)
    return f"values: {name}[{first}:+{count}] {value}"


def _turn(draw: Any, forged: Forged) -> str:
    """Damage that keeps a profile sound, or nearly: for these the kernels have to be safe."""
    layer = draw(st.integers(0, LAYERS - 1))
    kind = draw(st.sampled_from(["transpose", "sink", "spectrum", "bits", "levels", "name", "source"]))
    try:
        if kind == "transpose":
            basis = forged.tensor(f"layers.{layer}.key_basis")
            basis.copy_(basis.mT.clone())
        elif kind in ("sink", "spectrum"):
            scale = draw(st.sampled_from([0.0, 1e-30, 1e-10, 1e6, 1e15]))
            forged.tensor(f"layers.{layer}.value_{kind}").mul_(scale)
        elif kind == "bits":
            which = draw(st.sampled_from(["key", "value"]))
            bits = forged.tensor(f"layers.{layer}.{which}_bits")
            widths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 8]), min_size=DIM // 2, max_size=DIM // 2))
            bits.copy_(torch.tensor(widths, dtype=torch.uint8).repeat_interleave(2).expand_as(bits))
            forged.header["slot_bytes"] = draw(st.sampled_from([8, 16, 24, 40, 64, 72]))
        elif kind == "levels":
            forged.tensor("codebooks").mul_(draw(st.sampled_from([0.0, 1e-30, 1e3, 1e17])))
        elif kind == "name":
            forged.header["name"] = draw(MARKUP)
        else:
            forged.header["provenance"]["text_source"] = draw(MARKUP)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError):
        return f"turn: no {kind} left"
    return f"turn: {kind} of layer {layer}"


_DAMAGE = st.sampled_from(
    [_damage_bytes, _damage_length, _damage_table, _damage_header, _damage_values, _damage_values, _turn, _turn]
)


@st.composite
def forged_files(draw: Any) -> tuple[bytes, bool, list[str]]:
    """A file, whether whoever forged it renewed the digest, and what was done to it."""
    forged = Forged.sound()
    forged.renew = draw(st.sampled_from([True, True, True, True, False]))
    for damage in draw(st.lists(_DAMAGE, min_size=1, max_size=3)):
        forged.steps.append(damage(draw, forged))
    content = forged.assemble()
    if draw(st.integers(0, 9)) == 0:
        where = draw(st.integers(0, max(len(content) - 1, 0)))
        if draw(st.booleans()):
            content = content[:where]
            forged.steps.append(f"file cut at {where}")
        elif content:
            content = content[:where] + bytes([content[where] ^ 1 << draw(st.integers(0, 7))]) + content[where + 1 :]
            forged.steps.append(f"file flipped at {where}")
    return content, forged.renew, forged.steps
