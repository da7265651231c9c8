"""Disks that are full, and a profile that is replaced or deleted while it is served."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.process import command
from tests.faults.conftest import ANSWER_TOKENS, Account, Serving
from tests.faults.traffic import Load, company, status
from vllm_spectral.models.demo import cache_directory
from vllm_spectral.profile.storage import load_profile


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, a fifth of a profile."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system can only be mounted by root, and not in every container")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_leaves_no_half_of_a_profile(small_disk: Path, profile: Path) -> None:
    target = small_disk / "new.spectral"
    argv = command("calibrate", "demo", "-o", str(target), "--preset", "instant")
    refused = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "No space left" in refused.stderr and "Traceback" not in refused.stderr
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_leaves_the_old_profile_as_it_was(profile: Path, tmp_path: Path) -> None:
    """Where files may not grow past a limit, which stands for a disk on which the old one just fits."""
    old = tmp_path / "old.spectral"
    shutil.copy(profile, old)
    before = old.read_bytes()
    argv = command("calibrate", "demo", "-o", str(old), "--preset", "instant", "--bits", "3")
    limit = f"trap '' XFSZ; ulimit -f 200; exec {' '.join(argv)}"
    refused = subprocess.run(["bash", "-c", limit], capture_output=True, text=True, check=False)
    assert refused.returncode == 2, refused.stderr[-2000:]
    assert old.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["old.spectral"]


def test_a_server_runs_on_a_full_disk(small_disk: Path, serve: Serving, account: Account, texts: list[str]) -> None:
    """Caches are conveniences: a server whose cache directory is full answers all the same."""
    (small_disk / "filler").write_bytes(b"x" * (200 << 10))
    places = {name: str(small_disk) for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    places["VLLM_SPECTRAL_CACHE"] = str(cache_directory())  # the model itself must be somewhere
    with serve(environment=places) as server, company(server.url):
        answers = Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()
    account.add("a full disk for all caches", "every request answered", [answers])


def test_a_profile_replaced_and_deleted_while_it_is_served(
    serve: Serving, account: Account, texts: list[str], profile: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.spectral"
    shutil.copy(profile, mine)
    other = tmp_path / "other.spectral"
    argv = command("calibrate", "demo", "-o", str(other), "--preset", "instant", "--bits", "3")
    subprocess.run(argv, check=True, capture_output=True)
    with serve(path=mine) as server, company(server.url):
        load = Load(server.url, texts, ANSWER_TOKENS, 8)
        other.replace(mine)
        replaced = load.outcomes()
        digest = httpx.get(f"{server.url}/v1/kv_cache/profile").json()["digest"]
        assert digest == load_profile(profile).digest != load_profile(mine).digest, (
            "what is served, not what lies there"
        )
        mine.unlink()
        deleted = Load(server.url, texts, ANSWER_TOKENS, 8).outcomes()
        assert status(f"{server.url}/ready") == 200
    argv = command("serve", "demo", "--profile", str(mine))
    refused = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert refused.returncode == 2 and "no such profile" in refused.stderr.lower()
    account.add("profile replaced, then deleted", "all answered from the one that was read", [replaced, deleted])
