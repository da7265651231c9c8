"""Counting: moments, fidelity, bytes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.conftest import DIM, HEADS, correlated
from vllm_spectral.codec.codebook import Codebooks, normal_codebooks
from vllm_spectral.profile.schema import LayerProfile
from vllm_spectral.stats.fidelity import compare_logits
from vllm_spectral.stats.memory import LayerMemory, MemoryReport, WorkerMemory
from vllm_spectral.stats.moments import SINK_TOKENS, LayerMoments


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
    compressed = LayerMemory.of_codec("a", codec, 9, torch.empty(10, HEADS, 32, 64, dtype=torch.uint8))
    dense = LayerMemory.of_dense("b", torch.empty(10, HEADS, 32, 2 * DIM, dtype=torch.bfloat16))
    worker = WorkerMemory((compressed, dense), shared_bytes=1000, exact_bytes=50_000)
    assert WorkerMemory.from_wire(worker.to_wire()) == worker
    return MemoryReport.gather([worker, worker], num_blocks=10, block_size=32, used_blocks=4)


def test_the_report_counts_every_byte(report: MemoryReport) -> None:
    assert report.bytes_per_token == 2 * HEADS * (64 + 4 * DIM)
    assert report.uncompressed_bytes_per_token == 2 * 2 * HEADS * 4 * DIM
    assert report.pool_bytes == 320 * report.bytes_per_token
    assert (report.used_tokens, report.used_bytes) == (128, 128 * report.bytes_per_token)
    assert report.exact_tier_bytes == 100_000
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
    without = dataclasses.replace(
        report, workers=tuple(WorkerMemory(w.layers, 0, w.exact_bytes) for w in report.workers)
    )
    assert report.profile_bytes - without.profile_bytes == 2000
