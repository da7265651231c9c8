"""Profiles: what is written is what is read, and everything else has its own error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.conftest import HEADS, LAYERS
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.errors import (
    ProfileDigestError,
    ProfileError,
    ProfileFormatError,
    ProfileMismatchError,
    ProfileNotFoundError,
    ProfileVersionError,
)
from vllm_spectral.profile.report import plot_profile, summarize
from vllm_spectral.profile.schema import FIGURES, Expectation, LayerProfile, Profile
from vllm_spectral.profile.storage import load_profile, require_model, require_writable, save_profile


@pytest.fixture
def saved(profile: Profile, tmp_path: Path) -> Path:
    path = tmp_path / "small.spectral"
    save_profile(profile, path)
    return path


def rewrite(
    path: Path, *, header: dict[str, object] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> None:
    """Change the header or tensors of a profile without renewing its digest."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["vllm_spectral"])
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(content | (tensors or {}), path, metadata={"vllm_spectral": json.dumps(metadata | (header or {}))})


def test_round_trip(profile: Profile, saved: Path) -> None:
    loaded = load_profile(saved)
    assert loaded.digest
    assert dataclasses.replace(loaded, digest="", codebooks=profile.codebooks, layers=profile.layers) == profile
    for before, after in zip(profile.layers, loaded.layers, strict=True):
        for name, tensor in vars(before).items():
            assert torch.equal(tensor, getattr(after, name))


def test_what_is_expected_of_the_canary_survives_its_file(profile: Profile, tmp_path: Path) -> None:
    """And a profile without it, as earlier ones are, keeps its digest."""
    figures = torch.rand(LAYERS, HEADS, FIGURES)
    told = dataclasses.replace(profile, expectation=Expectation("5e" * 32, figures))
    saved = save_profile(told, tmp_path / "told.spectral")
    loaded = load_profile(tmp_path / "told.spectral").expectation
    assert loaded is not None and loaded.tokens == "5e" * 32
    assert torch.equal(loaded.figures, figures)
    silent = save_profile(profile, tmp_path / "silent.spectral")
    assert load_profile(tmp_path / "silent.spectral").expectation is None
    assert silent.digest != saved.digest


def test_ranks_find_what_is_expected_of_their_heads() -> None:
    """Each rank says the larger of keys and values; the mean over ranks is not that of one rank with all heads."""
    figures = torch.tensor([[[1.0, 1.4, 0.01, 0.03], [1.2, 1.0, 0.05, 0.02], [1.0, 1.0, 0.0, 0.0]]])
    expected = Expectation("5e" * 32, figures)
    assert expected.of_layer(0, 1) == pytest.approx((3.4 / 3, 0.06 / 3))
    assert expected.of_layer(0, 3) == pytest.approx((3.6 / 3, 0.08 / 3))
    assert expected.of_layer(0, 6) == expected.of_layer(0, 3), "replicas change nothing"


def test_the_digest_ignores_the_date_and_nothing_else(profile: Profile, tmp_path: Path) -> None:
    def digest(changed: Profile) -> str:
        return save_profile(changed, tmp_path / "other.spectral").digest

    def provenance(**fields: object) -> Profile:
        return dataclasses.replace(profile, provenance=dataclasses.replace(profile.provenance, **fields))

    original = digest(profile)
    assert digest(provenance(created="2031-05-05T00:00:00+00:00")) == original
    assert digest(provenance(seed=1)) != original
    assert digest(dataclasses.replace(profile, name="other")) != original


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileNotFoundError, match="calibrate"):
        load_profile(tmp_path / "none.spectral")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(ProfileFormatError, match="truncated"):
        load_profile(saved)


def test_a_foreign_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ProfileFormatError, match="not a spectral profile"):
        load_profile(path)


def test_a_pickle_is_not_even_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "profile.pt"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(ProfileFormatError):
        load_profile(path)


@pytest.mark.parametrize(
    "change", [{"header": {"slot_bytes": 72}}, {"header": {"name": "x"}}, {"tensors": {"layers.0.key_bits": "+1"}}]
)
def test_tampering_is_seen(saved: Path, change: dict[str, dict[str, object]]) -> None:
    if "tensors" in change:
        change = {"tensors": {"layers.0.key_bits": load_profile(saved).layers[0].key_bits + 1}}
    rewrite(saved, **change)
    with pytest.raises(ProfileDigestError, match="digest"):
        load_profile(saved)


def test_a_flipped_bit_is_seen(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1000] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ProfileDigestError):
        load_profile(saved)


def test_another_schema_version(saved: Path) -> None:
    rewrite(saved, header={"schema_version": 99})
    with pytest.raises(ProfileVersionError, match="99"):
        load_profile(saved)


def test_another_model(profile: Profile) -> None:
    other = dataclasses.replace(profile.fingerprint, weights="f" * 32)
    with pytest.raises(ProfileMismatchError, match="another model"):
        require_model(profile, other, Path("p"))
    require_model(profile, profile.fingerprint, Path("p"))


def test_a_profile_of_wrong_shape_is_refused(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "bad.spectral"
    save_profile(dataclasses.replace(profile, layers=profile.layers[:1]), path)
    with pytest.raises(ProfileFormatError, match="1 layers for a model of 2"):
        load_profile(path)


def test_an_unwritable_place_is_refused_early(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="directory"):
        require_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ProfileError, match="not a writable directory"):
        require_writable(tmp_path / "file" / "p.spectral")
    require_writable(tmp_path / "new" / "p.spectral")


def test_the_report_and_the_plot(saved: Path, tmp_path: Path) -> None:
    profile = load_profile(saved)
    summary = summarize(profile)
    assert summary.bits_per_element == 4.0
    assert summary.bytes_per_token == 2 * 3 * 64
    assert summary.compression_ratio == 4.0
    plot_profile(profile, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ProfileError, match="plot"):
        plot_profile(profile, tmp_path / "no" / "plot.png")
    with pytest.raises(ProfileError, match="plot"):
        plot_profile(profile, tmp_path / "plot.unknown")


def test_ranks_take_contiguous_heads_and_share_them_when_they_outnumber_them(layer: LayerProfile) -> None:
    halves = [layer.heads(0, 2).shard(rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([half.key_basis for half in halves]), layer.key_basis[:2])
    assert not torch.equal(halves[0].key_basis, halves[1].key_basis)
    replicas = [layer.heads(0, 2).shard(rank, 4) for rank in range(4)]
    for rank, replica in enumerate(replicas):
        assert torch.equal(replica.value_basis, layer.value_basis[rank // 2 : rank // 2 + 1])


def test_a_rank_holds_no_second_copy_of_the_bases(layer: LayerProfile) -> None:
    """The memory report counts a basis once; the profile and the codec must share it."""
    shard = layer.shard(0, 1)
    assert shard.key_basis.data_ptr() == layer.key_basis.data_ptr()
    codec = shard.codec(64, Codebooks(normal_codebooks()))
    assert codec.keys.basis.data_ptr() == layer.key_basis.data_ptr()
