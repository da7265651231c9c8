"""What hostile profiles got away with before it was closed, one test each; ``tests/fuzz`` looks for more."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fuzz.forgery import Forged, original, original_bytes
from vllm_spectral.cli.main import main
from vllm_spectral.errors import ProfileDigestError, ProfileError, ProfileFormatError, ProfileVersionError
from vllm_spectral.profile.container import brief
from vllm_spectral.profile.report import plot_profile
from vllm_spectral.profile.schema import Profile
from vllm_spectral.profile.storage import load_profile, require_writable, save_profile


def refusal(content: bytes, folder: Path, error: type[ProfileError] = ProfileFormatError) -> str:
    """The message of the error with which such a file is refused."""
    path = folder / "hostile.spectral"
    path.write_bytes(content)
    with pytest.raises(error) as caught:
        load_profile(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def with_values(change: Callable[[Forged], None]) -> bytes:
    """The sound file after a change, with a digest that fits."""
    forged = Forged.sound()
    change(forged)
    return forged.assemble()


def fill(name: str, value: float) -> bytes:
    return with_values(lambda forged: forged.tensor(name).view(-1)[3:5].fill_(value))  # type: ignore[arg-type, return-value]


def with_header(**fields: Any) -> bytes:
    return with_values(lambda forged: forged.header.update(fields))


def test_a_forged_file_with_nothing_changed_loads(tmp_path: Path) -> None:
    """Else the tests below would show nothing."""
    path = tmp_path / "same.spectral"
    path.write_bytes(Forged.sound().assemble())
    assert load_profile(path).digest == save_profile(original(), tmp_path / "p").digest


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("codebooks", float("nan"), "codebooks has numbers that are not finite"),
        ("canary", float("nan"), "what is expected of the canary has numbers that are not finite"),
        ("canary", -1.0, "a negative error ratio is expected of the canary"),
        ("codebooks", 5.0, "0 bits have more levels than they can name"),
        ("layers.1.key_sink", float("inf"), "layer 1: key_sink has numbers that are not finite"),
        ("layers.0.value_spectrum", float("nan"), "not finite"),
        ("layers.0.value_spectrum", -1.0, "negative"),
        ("layers.0.value_spectrum", 3e38, "beyond"),
        ("layers.1.key_basis", 0.9, "layer 1: key_basis is not orthogonal"),
        ("layers.1.value_basis", float("nan"), "not finite"),
        ("layers.0.key_bits", 255, "bits"),
        ("layers.0.value_bits", 9, "between 0 and 8"),
    ],
)
def test_numbers_that_make_no_sense_behind_a_right_digest(
    tmp_path: Path, name: str, value: float, complaint: str
) -> None:
    assert complaint in refusal(fill(name, value), tmp_path)


def test_levels_that_fall(tmp_path: Path) -> None:
    """Nearest levels are found by halving, which wants them to rise."""

    def swap(forged: Forged) -> None:
        levels = forged.tensor("codebooks")
        levels[4, 2] = levels[4, 9]

    assert "4 bits fall" in refusal(with_values(swap), tmp_path)


def test_keys_whose_channels_are_not_paired(tmp_path: Path) -> None:
    def unpair(forged: Forged) -> None:
        forged.tensor("layers.0.key_bits")[0, 1] += 1

    assert "2j and 2j + 1" in refusal(with_values(unpair), tmp_path)


def test_codes_that_do_not_fit_their_slot(tmp_path: Path) -> None:
    assert "bytes more than the slot's 16" in refusal(with_header(slot_bytes=16), tmp_path)


@pytest.mark.parametrize("size", [0, -8, 12, 1 << 40, "24", 24.0, True, None, [24]])
def test_slots_of_impossible_size(tmp_path: Path, size: Any) -> None:
    assert "slot" in refusal(with_header(slot_bytes=size), tmp_path)


def test_figures_of_the_canary_without_its_tokens(tmp_path: Path) -> None:
    assert "the tensor canary does not belong" in refusal(with_header(canary_tokens=None), tmp_path)
    assert "canary_tokens" in refusal(with_header(canary_tokens="x"), tmp_path)


@pytest.mark.parametrize("provenance", [[], "x", {"basis": "spectral"}, None])
def test_a_provenance_of_another_type(tmp_path: Path, provenance: Any) -> None:
    assert "provenance" in refusal(with_header(provenance=provenance), tmp_path)


def test_a_fingerprint_of_numbers_that_only_look_whole(tmp_path: Path) -> None:
    def float_heads(forged: Forged) -> None:
        forged.header["fingerprint"]["num_kv_heads"] = 2.0

    assert "num_kv_heads" in refusal(with_values(float_heads), tmp_path)


@pytest.mark.parametrize("version", ["\x1b[2J", "x" * 100_000, [], None, True, 2.0])
def test_a_schema_version_of_another_type(tmp_path: Path, version: Any) -> None:
    refusal(with_header(schema_version=version), tmp_path, ProfileError if version == 2.0 else ProfileVersionError)


def test_whole_bits_stay_what_they_were(tmp_path: Path) -> None:
    """Read as 3.0 and written again, they were another profile with another digest."""
    path = tmp_path / "whole.spectral"
    path.write_bytes(with_values(lambda forged: forged.header["provenance"].update(requested_bits=3)))
    loaded = load_profile(path)
    assert save_profile(loaded, tmp_path / "again.spectral").digest == loaded.digest


def test_deep_json(tmp_path: Path) -> None:
    def deepen(forged: Forged) -> None:
        forged.header_text = '{"schema_version": ' + "[" * 100_000 + "}"

    assert "not a complete profile" in refusal(with_values(deepen), tmp_path)

    def deepen_outside(forged: Forged) -> None:
        forged.table_text = '{"__metadata__": ' + "[" * 100_000

    assert "not JSON" in refusal(with_values(deepen_outside), tmp_path)


def test_a_key_that_occurs_twice(tmp_path: Path) -> None:
    """Two parsers read this file, and may not be made to see different ones."""

    def twice(forged: Forged) -> None:
        forged.header_text = json.dumps(forged.header)[:-1] + ', "num_layers": 2}'

    assert "twice" in refusal(with_values(twice), tmp_path)


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\nb", "\ud800", "x" * 5000, 7])
def test_names_that_a_terminal_would_suffer_from(tmp_path: Path, name: Any) -> None:
    assert "name" in refusal(with_header(name=name), tmp_path)


@pytest.mark.parametrize("dtype", ["F64", "I32", "BF16", "X\x1b[2J"])
def test_tensors_of_another_type(tmp_path: Path, dtype: str) -> None:
    def retype(forged: Forged) -> None:
        forged.table["layers.0.key_basis"]["dtype"] = dtype

    assert "instead of F32" in refusal(with_values(retype), tmp_path)


def test_tensors_that_share_their_bytes(tmp_path: Path) -> None:
    def share(forged: Forged) -> None:
        forged.table["layers.0.key_basis"]["data_offsets"] = forged.table["layers.1.key_basis"]["data_offsets"]

    refusal(with_values(share), tmp_path)


def test_a_model_larger_than_the_file(tmp_path: Path) -> None:
    """Nothing is allocated for what a header only promises."""

    def promise(forged: Forged) -> None:
        forged.header["fingerprint"] |= {"num_layers": 2048, "num_kv_heads": 1024}
        forged.header["num_layers"] = 2048

    refusal(with_values(promise), tmp_path)


def test_a_kept_digest_does_not_fit_changed_numbers(tmp_path: Path) -> None:
    forged = Forged.sound()
    forged.tensor("layers.0.key_sink").mul_(2)
    forged.renew = False
    refusal(forged.assemble(), tmp_path, ProfileDigestError)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "a directory"), (tmp_path / "pipe", "a named pipe"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ProfileFormatError, match=kind):
            load_profile(path)


def test_a_path_that_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="too long"):
        load_profile(tmp_path / ("x" * 5000))


def test_brackets_in_names_are_shown_as_they_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were markup to the table, and dollars were formulas to the plot."""
    profile = dataclasses.replace(original(), name="[/bold] $\\frac{$")
    save_profile(profile, tmp_path / "p.spectral")
    assert main(["inspect", str(tmp_path / "p.spectral")]) == 0
    assert "[/bold] $\\frac{$" in capsys.readouterr().out
    plot_profile(profile, tmp_path / "p.png")


def test_a_name_that_could_not_be_read_back_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="printed"):
        require_writable(tmp_path / "a\nb.spectral")


_CUT = """
import sys
from pathlib import Path
from vllm_spectral.profile.storage import load_profile
path = Path(sys.argv[1])
profile = load_profile(path)
with path.open("r+b") as file:
    file.truncate(100)
print(sum(float(layer.key_basis.abs().sum()) for layer in profile.layers) > 0)
"""


def test_a_file_that_is_cut_short_while_it_is_in_use(tmp_path: Path) -> None:
    """Mapped into memory it would end the process with a bus error."""
    path = tmp_path / "p.spectral"
    path.write_bytes(original_bytes())
    result = subprocess.run([sys.executable, "-c", _CUT, str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


def test_one_layer_too_few_or_too_many(tmp_path: Path) -> None:
    def one_more(forged: Forged) -> None:
        forged.table["layers.2.key_bits"] = dict(forged.table["layers.1.key_bits"])

    assert "does not belong" in refusal(with_values(one_more), tmp_path)

    def one_less(forged: Forged) -> None:
        del forged.table["layers.1.key_bits"]

    assert "lacks" in refusal(with_values(one_less), tmp_path)


def test_the_original_is_left_alone() -> None:
    """The fuzzers change copies."""
    assert torch.equal(original().layers[0].key_bits[:, ::2], original().layers[0].key_bits[:, 1::2])


def test_names_of_many_texts_are_cut_to_what_is_read_back(profile: Profile, tmp_path: Path) -> None:
    source = brief(", ".join(f"text-{index}\n.txt" for index in range(2000)))
    provenance = dataclasses.replace(profile.provenance, text_source=source)
    save_profile(dataclasses.replace(profile, provenance=provenance), tmp_path / "p.spectral")
    assert load_profile(tmp_path / "p.spectral").provenance.text_source.startswith("text-0 .txt, text-1 .txt")
