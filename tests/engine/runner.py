"""Runs one real engine in a process of its own: a JSON request on standard input, a JSON answer on standard output.

Not a test: the tests start it, because an engine cannot be taken down completely inside a process.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

PRETEND_TRITON = "TEST_TRITON_CPU"
"""Set: vLLM finds that Triton serves the CPU, which under Triton's interpreter it does. Its second model runner asks."""


def pretend_triton() -> None:
    """Must run before vLLM is imported."""
    from types import SimpleNamespace

    from triton import backends

    backends.backends.clear()
    backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily.

    The request: ``model``, ``options`` for ``LLM``, ``rounds`` (lists of prompts as token ids or text; each round is
    one batch) and ``max_tokens``.
    """
    if os.environ.get(PRETEND_TRITON):
        pretend_triton()
    from vllm import LLM, SamplingParams

    spectral = "additional_config" in request["options"]
    if spectral:
        request["options"]["worker_extension_cls"] = "vllm_spectral.backend.worker.WorkerExtension"
    llm = LLM(request["model"], enforce_eager=True, block_size=32, disable_log_stats=False, **request["options"])
    params = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
    rounds = []
    for prompts in request["rounds"]:
        batch = [p if isinstance(p, str) else {"prompt_token_ids": p} for p in prompts]
        outputs = llm.generate(batch, params, use_tqdm=False)
        rounds.append([{"ids": list(o.outputs[0].token_ids), "cached": o.num_cached_tokens} for o in outputs])
    metrics = {metric.name: getattr(metric, "value", None) for metric in llm.get_metrics()}
    answer = {
        "rounds": rounds,
        "capacity": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
        "preemptions": metrics["vllm:num_preemptions"],
        "drafted": metrics.get("vllm:spec_decode_num_draft_tokens"),
        "accepted": metrics.get("vllm:spec_decode_num_accepted_tokens"),
        "kernels": llm.collective_rpc("spectral_memory")[0]["kernels"] if spectral else None,
        "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
        "exact": llm.collective_rpc("spectral_exact_counters")[0] if spectral else None,
    }
    llm.llm_engine.engine_core.shutdown()
    return answer


if __name__ == "__main__":
    if "'tensor_parallel_size': 2" not in (text := sys.stdin.read()).replace('"', "'"):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # vLLM writes to standard output as it likes; the answer goes to the descriptor that was there before.
    answer = os.dup(1)
    os.dup2(2, 1)
    result = run(json.loads(text))
    os.write(answer, json.dumps(result).encode())
    os.close(answer)
    os._exit(0)
