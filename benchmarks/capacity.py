"""Effective capacity at a working point: everything that is resident for the cache, against bf16.

``python -m benchmarks.capacity PROFILE [REQUESTS] [CONTEXT]`` gives the real engine exactly the memory that so many
requests of the demo model take in pages and exact copies, lets them all decode at once with their contexts full, and prints
what it reports: the kernels' workspace grows with the work.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

from vllm_spectral.backend.worker import EXTENSION
from vllm_spectral.exact.window import ExactWindow, copy_bytes, group_tokens
from vllm_spectral.models.demo import demo_model
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.storage import load_profile
from vllm_spectral.stats.memory import EngineMemory, MemoryReport, WorkerMemory

BLOCK = 32
ANSWER_TOKENS = 16


def main(path: str, requests: int, context: int) -> None:
    """Start, ask, print."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams, TokensPrompt

    model, profile = ModelDescription.from_directory(demo_model()), load_profile(Path(path))
    layers, heads = model.num_layers, model.num_kv_heads
    size = group_tokens(BLOCK)
    window = ExactWindow().entries_per_request(size) * size * copy_bytes(heads, model.head_dim) * layers
    pages = context * layers * heads * profile.slot_bytes
    llm = LLM(
        str(model.path), enforce_eager=True, block_size=BLOCK, max_model_len=context, max_num_seqs=requests,
        kv_cache_memory_bytes=requests * (pages + window), worker_extension_cls=EXTENSION,
        additional_config={"spectral": {"profile": path, "exact_bytes": requests * window}},
    )  # fmt: skip
    draw = random.Random(0)
    length = context - ANSWER_TOKENS
    prompts = [TokensPrompt(prompt_token_ids=draw.choices(range(100, 10_000), k=length)) for _ in range(requests)]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True))
    assert all(len(answer.outputs[0].token_ids) == ANSWER_TOKENS for answer in answers)
    (answer,) = llm.collective_rpc("spectral_memory")
    report = MemoryReport(BLOCK, (EngineMemory((WorkerMemory.from_wire(answer),)),))
    for name in (
        "capacity_tokens", "pool_bytes", "exact_tier_bytes", "workspace_bytes", "profile_bytes", "compression_ratio",
        "effective_compression_ratio",
    ):  # fmt: skip
        sys.stdout.write(f"{name:>28} {getattr(report, name):,.2f}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("requests", type=int, nargs="?", default=16)
    parser.add_argument("context", type=int, nargs="?", default=8192)
    arguments = parser.parse_args()
    main(arguments.profile, arguments.requests, arguments.context)
