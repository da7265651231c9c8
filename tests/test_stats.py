"""Counting: moments, fidelity, bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.conftest import DIM, HEADS, correlated
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.fidelity import compare_logits
from vllm_spectral.stats.memory import EngineMemory, LayerMemory, MemoryReport, WorkerMemory
from vllm_spectral.stats.moments import SINK_TOKENS, LayerMoments
from vllm_spectral.stats.resident import process_bytes, tensor_bytes


def test_moments_do_not_depend_on_how_tokens_arrive() -> None:
    key, value = correlated(60, 1), correlated(60, 2)
    query = torch.randn(60, 2 * HEADS, DIM)
    positions = torch.arange(60) % 20
    whole, parts = LayerMoments(HEADS, DIM), LayerMoments(HEADS, DIM)
    whole.add(query, key, value, positions)
    for rows in (slice(0, 1), slice(1, 33), slice(33, 60)):
        parts.add(query[rows], key[rows], value[rows], positions[rows])
    assert whole.num_tokens == parts.num_tokens == 3 * (20 - SINK_TOKENS)
    assert whole.num_sinks == 3
    assert whole.num_queries == 2 * whole.num_tokens
    for name in ("keys", "values", "queries", "value_sum", "key_sink", "value_sink"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(whole.key_sink, key[positions == 0].double().sum(0))


def test_queries_count_for_the_kv_head_they_share() -> None:
    moments = LayerMoments(2, DIM)
    query = torch.zeros(1, 4, DIM)
    query[0, 2, 5] = 3.0  # the third of four query heads belongs to the second KV head
    moments.add(query, torch.ones(1, 2, DIM), torch.ones(1, 2, DIM), torch.tensor([9]))
    assert moments.queries[0].abs().max() == 0
    assert moments.queries[1, 5, 5] == 9.0


def test_equal_distributions_do_not_differ() -> None:
    logits = torch.randn(5, 50)
    same = compare_logits(logits, logits + 3.0, torch.arange(5))
    assert same["kl"].abs().max() < 1e-5
    assert (same["top1"] == 1).all()
    torch.testing.assert_close(same["nll_reference"], same["nll_candidate"])


def test_divergence_is_what_its_definition_says() -> None:
    reference, candidate = torch.randn(4, 20, dtype=torch.float64), torch.randn(4, 20, dtype=torch.float64)
    p, q = reference.softmax(-1), candidate.softmax(-1)
    found = compare_logits(reference, candidate, torch.tensor([1, 2, 3, 4]))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(found["kl"].double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["nll_candidate"][0].double(), -q[0, 1].log(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def report(layer: LayerProfile) -> MemoryReport:
    """Two ranks, each with a compressed and an uncompressed layer, 10 blocks of 32 tokens, 4 of them in use."""
    codec = layer.codec(64, Codebooks(normal_codebooks()))
    pages = torch.empty(10, HEADS, 32, 64, dtype=torch.uint8)
    compressed = LayerMemory.of_codec("a", codec, 9, pages, exact_bytes=50_000)
    dense = LayerMemory.of_dense("b", torch.empty(10, HEADS, 32, 2 * DIM, dtype=torch.bfloat16))
    allocated = compressed.page_bytes + dense.page_bytes
    worker = WorkerMemory((compressed, dense), 10, allocated, shared_bytes=1000, exact_used_bytes=20_000)
    assert WorkerMemory.from_wire(worker.to_wire()) == worker
    return MemoryReport(32, (EngineMemory((worker, worker), used_blocks=4, cached_blocks=3),))


def test_the_report_counts_every_byte(report: MemoryReport) -> None:
    assert report.bytes_per_token == 2 * HEADS * (64 + 4 * DIM)
    assert report.uncompressed_bytes_per_token == 2 * 2 * HEADS * 4 * DIM
    assert report.pool_bytes == 320 * report.bytes_per_token
    assert (report.used_tokens, report.used_bytes) == (128, 128 * report.bytes_per_token)
    assert (report.cached_tokens, report.cached_bytes) == (96, 96 * report.bytes_per_token)
    assert report.used_bytes + report.cached_bytes + report.free_bytes == report.pool_bytes
    assert report.pool_bytes == sum(w.allocated_bytes for w in report.engines[0].workers)
    assert (report.exact_tier_bytes, report.exact_tier_used_bytes) == (100_000, 40_000)
    assert report.fp8_capacity_tokens // 64 == report.uncompressed_capacity_tokens // 32
    # Both come out of the memory that vLLM was given, and bf16 pages would have had all of it.
    given = report.pool_bytes + report.exact_tier_bytes
    assert report.uncompressed_capacity_tokens == given // (32 * report.uncompressed_bytes_per_token) * 32
    assert report.resident_bytes > report.pool_bytes + report.exact_tier_bytes + report.profile_bytes
    assert report.effective_compression_ratio < report.compression_ratio
    assert [layer.compressed for layer in report.layers] == [True, False]
    assert report.layers[1].key_bits == 16.0
    assert report.layers[0].key_bits + report.layers[0].value_bits <= 8.0


def test_profile_bytes_cover_the_bases(report: MemoryReport) -> None:
    bases = 2 * 2 * HEADS * DIM * DIM * 4
    assert report.profile_bytes > bases
    (engine,) = report.engines
    bare = dataclasses.replace(engine, workers=tuple(dataclasses.replace(w, shared_bytes=0) for w in engine.workers))
    assert report.profile_bytes - dataclasses.replace(report, engines=(bare,)).profile_bytes == 2000


def test_engines_add_up(report: MemoryReport) -> None:
    twice = dataclasses.replace(report, engines=report.engines * 2)
    for name in ("pool_bytes", "used_bytes", "cached_bytes", "free_bytes", "exact_tier_bytes", "profile_bytes"):
        assert getattr(twice, name) == 2 * getattr(report, name)
    assert twice.capacity_tokens == 2 * report.capacity_tokens
    assert twice.bytes_per_token == report.bytes_per_token
    assert twice.compression_ratio == report.compression_ratio


def test_memory_is_resident_once_it_is_written() -> None:
    size = 64 << 20
    tensor = torch.empty(size, dtype=torch.uint8)
    before = process_bytes()
    assert (tensor_bytes(tensor) or 0) < size // 8
    tensor[: size // 2] = 1
    assert size // 2 <= (tensor_bytes(tensor) or 0) < size * 0.6
    assert 0.9 < (process_bytes() - before) / (size // 2) < 1.2
