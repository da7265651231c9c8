"""Flags that this server refuses instead of ignoring them, and one that it warns of."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from argparse import Namespace
from pathlib import Path

import pytest
from vllm import platforms
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm_spectral_server import launch
from vllm_spectral_server.front_end import engine_config
from vllm_spectral_server.launch import refuse, require_device, shares_cores

from vllm_spectral.backend.engine import cpu_dtype
from vllm_spectral.cli import serve
from vllm_spectral.config import SpectralConfig
from vllm_spectral.errors import ConfigError
from vllm_spectral.models.demo import demo_model


def check(*flags: str) -> None:
    refuse(make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "any", *flags]))


@pytest.mark.parametrize(
    "flags",
    [
        (), ("--data-parallel-size", "2"), ("--tensor-parallel-size", "2"), ("--api-server-count", "1"),
        ("--api-server-count", "2"), ("--api-server-count", "2", "--data-parallel-size", "2"),
        ("--data-parallel-size", "2", "--data-parallel-size-local", "2"),
    ],
)  # fmt: skip
def test_what_is_served(flags: tuple[str, ...]) -> None:
    check(*flags)


@pytest.mark.parametrize(
    "flags",
    [
        ("--api-server-count", "0"), ("--headless",), ("--data-parallel-rank", "0"), ("--nnodes", "2"),
        ("--data-parallel-size", "2", "--data-parallel-size-local", "1"), ("--data-parallel-hybrid-lb",), ("--grpc",),
        ("--api-server-count", "2", "--enable-elastic-ep"),
        ("--disable-log-stats",), ("--scheduler-cls", "any.Scheduler"), ("--worker-extension-cls", "any.Extension"),
        ("--revision", "v1"), ("--kv-offloading-size", "1"), ("--enable-sleep-mode",),
    ],
)  # fmt: skip
def test_what_is_refused_and_by_which_name(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as refused:
        check(*flags)
    assert flags[-1] in str(refused.value) or flags[-2] in str(refused.value)


def test_the_help_tells_every_default_that_is_ours() -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    serve.add_parser(commands)
    told = re.findall(r"--[\w-]+|\d[\d.]*\d|[A-Z]+", commands.choices["serve"].description or "")
    flags = launch.default_flags([], "MODEL")
    for flag, value in itertools.pairwise([*flags, "--"]):
        if flag.startswith("--"):
            assert flag in told
            assert value.startswith("--") or value in (*told, cpu_dtype()), (flag, value)
    assert {"--max-num-batched-tokens", str(launch.STEP_TOKENS)} <= set(told)
    assert launch.default_flags(["--watermark=0", "--no-enforce-eager"], "MODEL") == [
        part for part in flags if part not in ("--watermark", str(launch.ROOM_TO_GROW), "--enforce-eager")
    ]


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ((), launch.STEP_TOKENS), (("--max-num-seqs", "16"), launch.STEP_TOKENS), (("--max-num-seqs", "9999"), 9999),
        (("--max-num-batched-tokens", "2048"), 2048), (("--no-enable-chunked-prefill",), None),
        (("--performance-mode", "throughput"), None), (("--enable-lora",), None),
    ],
)  # fmt: skip
def test_a_step_is_short_unless_something_wants_it_long(flags: tuple[str, ...], tokens: int | None) -> None:
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "any", *flags])
    assert launch.step_tokens(args) == tokens


def test_what_the_engine_reads_from_the_environment_and_what_of_it_is_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("TORCHDYNAMO_DISABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        # Set first, so that what the launch sets is undone as well.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    launch.set_environment(Namespace(enforce_eager=False))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == str(launch.KEPT_PRODUCTS)
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    launch.set_environment(Namespace(enforce_eager=True))
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


@pytest.mark.parametrize(
    ("engines", "nodes", "bind", "shared"),
    [(2, 1, "auto", True), (2, 2, "auto", False), (1, 1, "auto", False), (2, 1, "0|1", False), (2, 1, "nobind", False)],
)
def test_engines_that_would_share_cores(
    engines: int, nodes: int, bind: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in range(nodes):
        (tmp_path / f"node{node}").mkdir()
    monkeypatch.setattr(launch, "NUMA_NODES", tmp_path)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    assert shares_cores(Namespace(data_parallel_size=engines, tensor_parallel_size=1)) is shared


def test_what_vllm_refuses_is_said_in_a_line() -> None:
    """Three KV heads on two ranks; it used to be a traceback."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    with pytest.raises(ConfigError, match=r"attention heads \(9\) must be divisible by tensor parallel size \(2\)"):
        engine_config(AsyncEngineArgs(str(demo_model(progress=False)), tensor_parallel_size=2))


def test_the_cpu_needs_no_leave_and_other_platforms_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What CUDA is told: tests/cuda."""
    require_device(SpectralConfig())
    with pytest.raises(ConfigError, match="--experimental-cuda: this vLLM runs on the CPU"):
        require_device(SpectralConfig(allow_unproven_device=True))
    monkeypatch.setattr(type(platforms.current_platform), "is_cpu", lambda _: False)
    with pytest.raises(ConfigError, match="served are the CPU"):
        require_device(SpectralConfig(allow_unproven_device=True))
