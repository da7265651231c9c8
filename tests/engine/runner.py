"""Runs real engines, each in a process of its own, because an engine cannot be taken down completely inside a process.

Not a test: the tests start it once. Every line on standard input is a JSON request, answered by a line on standard output,
the exit status. The engines are forked from this process, which has imported vLLM already: that takes ten seconds each time.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
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


def answer(request: dict[str, Any]) -> None:
    """In the engine's process: write the answer where the request says, and the log."""
    # Workers of a tensor-parallel engine outlive a crashed parent: whoever asks kills the group.
    os.setsid()
    Path(request["pid"]).write_text(str(os.getpid()))
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.environ.update(request["environment"])
    if request["options"].get("tensor_parallel_size", 1) == 1:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    Path(request["answer"]).write_text(json.dumps(run(request)))


def main() -> None:
    """Until standard input ends."""
    # What vLLM reads when it is imported; a process that pretends imports nothing before.
    if not os.environ.get(PRETEND_TRITON):
        import vllm_spectral.evaluation.preload  # noqa: F401
    for line in sys.stdin:
        child = os.fork()
        if not child:
            status = 1
            try:
                answer(json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
