"""Whole vLLM on a GPU, cache beside cache: ``python -m benchmarks.gpu.engine --json benchmarks/results/gpu-engine.json``.

Needs vLLM and this package with its plugin (`pip install -e .`). A model in the shape of Llama-3.1-8B is made up, with dummy
weights: what a step takes depends on bytes and sizes, not on what the weights say. Every kind of cache gets the same bytes
and a process of its own, with a time limit:

    bf16, bf16-triton   vLLM's FlashAttention and its Triton kernels on bf16 pages
    fp8, int4           vLLM's Triton kernels on fp8 and int4_per_token_head pages
    turboquant          vLLM's turboquant_4bit_nc
    quality, balanced, compact
                        spectral pages with the presets' bits (4, 3, 2), on a Hadamard basis, which needs no calibration

First a small random model is asked with bf16 and with 8-bit spectral pages, and nothing is timed unless both give a prompt's
tokens nearly the same probabilities, and decoding (replayed graphs) gives the tokens that it chose the probabilities
that they have in a prompt. Then, per kind: decoding at several contexts and batches (the median step of those in which all
requests decode), and how many requests of 16k fit, decoded all at once. What does not fit is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import save
from vllm_spectral.calibration.presets import PRESETS

EDGE = 8
"""Steps at either end of a run that are not timed."""
NEW_TOKENS = 64 + 2 * EDGE
GATE_BITS = 8.0
GATE_TOKENS = 700
GATE_DECODED = 48
GATE_TOLERANCE = 0.1
"""Mean difference of log-probabilities that is let through: six times what the CPU's kernels show at 8 bits."""
STOCK: dict[str, dict[str, Any]] = {
    "bf16": {"attention_backend": "FLASH_ATTN"},
    "bf16-triton": {"attention_backend": "TRITON_ATTN"},
    "fp8": {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "fp8"},
    "int4": {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "int4_per_token_head"},
    "turboquant": {"kv_cache_dtype": "turboquant_4bit_nc"},
}
SPECTRAL = ("quality", "balanced", "compact")
ON_THE_CPU = ("bf16", *SPECTRAL)
"""What a machine without a GPU can run, to try this program out: on vLLM's CPU attention and our native kernels."""


def arguments_of(kind: str, model: Path, *, cuda: bool, bits: float | None = None) -> dict[str, Any]:
    """VLLM's arguments for a kind of cache.

    Args:
        kind: see the module.
        model: the model's directory, where a profile is made if the kind needs one.
        cuda: whether vLLM runs on a GPU.
        bits: of a spectral kind; default: the preset's.
    """
    if kind in STOCK:
        return dict(STOCK[kind]) if cuda else {}
    # Only here: it takes the package with its requirements, which the kernels' own benchmark does without.
    from benchmarks.gpu.models import instant_profile

    spectral: dict[str, Any] = {"profile": str(instant_profile(model, bits or PRESETS[kind].bits))}
    if not cuda:
        return {"additional_config": {"spectral": spectral}, "block_size": 32}
    spectral["allow_unproven_device"] = True
    return {"attention_backend": "CUSTOM", "additional_config": {"spectral": spectral}}


def capture_sizes(batches: list[int], most: int) -> list[int]:
    """Batch sizes to capture graphs for: those to be timed, and steps of 16 up to the most requests."""
    return sorted({*batches, 1, *range(16, most + 1, 16), most})


class Engine:
    """One engine in this process."""

    def __init__(self, model: Path, kind: dict[str, Any], options: dict[str, Any], *, cuda: bool) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        graphs = options.pop("capture", None)
        if cuda:
            options["dtype"] = "bfloat16"
            options["compilation_config"] = {
                # Whole graphs of decode steps need no compiler, which would take most of a short loan of a GPU.
                "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": graphs,
            }  # fmt: skip
        else:
            options["enforce_eager"] = True
        self._llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=False,
            **options,
            **kind,
        )
        self.engine: Any = self._llm.llm_engine
        self.cache = self.engine.vllm_config.cache_config
        self.vocabulary: int = self.engine.vllm_config.model_config.get_vocab_size()
        self._runs = 0

    def prompt(self, tokens: int, number: int) -> list[int]:
        """Token ids that no other request has."""
        return [(7 * j + 13 * number) % (self.vocabulary - 10) + 5 for j in range(tokens)]

    def fit(self, context: int) -> int:
        """Requests of so many tokens that the pages hold to their end."""
        blocks = -(-(context + NEW_TOKENS) // self.cache.block_size)
        return int(self.cache.kv_cache_size_tokens // (blocks * self.cache.block_size))

    def decode(self, context: int, batch: int) -> dict[str, Any]:
        """Time the steps in which ``batch`` requests of ``context`` tokens decode."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        self._runs += 1
        for number in range(batch):
            prompt = {"prompt_token_ids": self.prompt(context, number)}
            self.engine.add_request(f"{self._runs}-{number}", prompt, sampling)
        started, ticks = time.perf_counter(), []
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            ticks.append((time.perf_counter(), len(outputs) == batch))
        full = [tick for tick, all_decode in ticks if all_decode]
        steps = [after - before for before, after in zip(full[EDGE:-EDGE], full[EDGE + 1 :], strict=False)]
        if not steps:
            raise RuntimeError(f"no step in which all {batch} requests decode: they do not fit at once")
        step = statistics.median(steps)
        return {
            "context": context, "batch": batch, "steps": len(steps), "step_ms": 1e3 * step, "tokens_per_second": batch / step,
            "prompts_seconds": full[0] - started, "all_seconds": ticks[-1][0] - started,
            "preemptions": self._preemptions(),
        }  # fmt: skip

    def _preemptions(self) -> int:
        return int(sum(m.value for m in self._llm.get_metrics() if m.name == "vllm:num_preemptions"))

    def log_probabilities(self, tokens: int) -> list[float]:
        """Of a prompt's tokens, each in the light of all before it."""
        from vllm import SamplingParams

        prompt = self.prompt(tokens, 1)
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (answer,) = self._llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return _of(prompt[1:], answer.prompt_logprobs[1:])

    def decoded_against_prompted(self, tokens: int) -> float:
        """Mean difference of the log-probabilities of tokens that follow a prompt: as they are chosen, and in a prompt."""
        from vllm import SamplingParams

        prompt = self.prompt(tokens, 2)
        sampling = SamplingParams(temperature=0, max_tokens=GATE_DECODED, logprobs=0, ignore_eos=True, detokenize=False)
        (answer,) = self._llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        ids = list(answer.outputs[0].token_ids)
        decoded = _of(ids, answer.outputs[0].logprobs)
        sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (answer,) = self._llm.generate([{"prompt_token_ids": prompt + ids}], sampling, use_tqdm=False)
        return _apart(decoded, _of(ids, answer.prompt_logprobs[tokens:]))


def _of(tokens: list[int], entries: list[Any]) -> list[float]:
    return [float(entry[token].logprob) for token, entry in zip(tokens, entries, strict=True)]


def _apart(found: list[float], expected: list[float]) -> float:
    return statistics.mean(abs(a - b) for a, b in zip(found, expected, strict=True))


def run_kind(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one kind, everything."""
    from vllm.platforms import current_platform

    cuda, model = current_platform.is_cuda(), Path(task["model"])
    kind = arguments_of(task["kind"], model, cuda=cuda, bits=task.get("bits"))
    if task["gate"]:
        options = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 4, "capture": [1, 2, 4]}
        engine = Engine(model, kind, {**options, "kv_cache_memory_bytes": 64 << 20}, cuda=cuda)
        return {
            "log_probabilities": engine.log_probabilities(GATE_TOKENS),
            "decoded_against_prompted": engine.decoded_against_prompted(GATE_TOKENS),
        }
    longest = max(*task["contexts"], task["fit_context"]) + NEW_TOKENS
    options = {
        "load_format": "dummy", "max_model_len": longest, "max_num_seqs": task["most"],
        "max_num_batched_tokens": task["chunk"], "kv_cache_memory_bytes": task["kv_bytes"],
        "capture": capture_sizes(task["batches"], task["most"]),
    }  # fmt: skip
    engine = Engine(model, kind, options, cuda=cuda)
    result: dict[str, Any] = {
        "kind": task["kind"], "capacity_tokens": engine.cache.kv_cache_size_tokens, "decode": [],
        "device": current_platform.get_device_name(),
    }  # fmt: skip
    engine.decode(min(task["contexts"]), 1)  # whatever is compiled or loaded at first use
    for context in task["contexts"]:
        for batch in task["batches"]:
            if batch > engine.fit(context):
                result["decode"].append({"context": context, "batch": batch, "does_not_fit": engine.fit(context)})
            else:
                result["decode"].append(engine.decode(context, batch))
            _tell(result["decode"][-1])
    fit = engine.fit(task["fit_context"])
    result["requests_that_fit"] = fit
    result["all_that_fit"] = engine.decode(task["fit_context"], min(fit, task["most"])) if fit else None
    _tell({"requests_that_fit": fit})
    return result


def _tell(entry: dict[str, Any]) -> None:
    sys.stderr.write(f"  {entry}\n")


def in_a_process(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run a task in a child; what it found, or ``failed`` with the reason."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu.engine", "--task", json.dumps(task | {"answer": str(answer)})]
        with log.open("wb") as out:
            child = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
            try:
                status = str(child.wait(seconds))
            except subprocess.TimeoutExpired:
                status = f"not done after {seconds:g} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        if answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text())
            return found
        return {"kind": task["kind"], "failed": status, "log": log.read_text(errors="replace")[-3000:]}


def gate(directory: Path, seconds: float) -> dict[str, float]:
    """How far the answers of spectral pages are from bf16's, on a small model: mean differences of log-probabilities.

    Returns:
        ``against_bf16``; and ``decoded_against_prompted`` on either kind of pages.

    Raises:
        RuntimeError: if one of both could not be asked.
    """
    from benchmarks.gpu.models import SMALL, random_model

    random_model(directory, SMALL)
    answers = {}
    for kind, bits in (("bf16", None), ("quality", GATE_BITS)):
        task = {"kind": kind, "model": str(directory), "gate": True, "bits": bits}
        answers[kind] = answer = in_a_process(task, seconds)
        if "failed" in answer:
            raise RuntimeError(f"{kind} did not answer: {answer['failed']}\n{answer['log']}")
    stock, ours = answers.values()
    return {
        "against_bf16": _apart(ours["log_probabilities"], stock["log_probabilities"]),
        "decoded_against_prompted": ours["decoded_against_prompted"],
        "decoded_against_prompted_bf16": stock["decoded_against_prompted"],
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--kinds", nargs="+", choices=[*STOCK, *SPECTRAL], default=[*STOCK, *SPECTRAL])
    found.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768], help="tokens per request (8192 32768)")
    found.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="requests at once (1 8 32)")
    found.add_argument("--fit-context", type=int, default=16384, help="of the requests that are fitted in (16384)")
    found.add_argument("--most", type=int, default=256, help="most requests at once (256)")
    found.add_argument("--kv-gib", type=float, default=40.0, help="memory of every cache, exact copies included (40)")
    found.add_argument("--chunk", type=int, default=16384, help="most tokens of a step (16384)")
    found.add_argument("--layers", type=int, help="of the model (32); fewer to try it out")
    found.add_argument("--small", action="store_true", help="a tiny model instead, to try it out")
    found.add_argument("--minutes", type=float, default=5.0, help="time limit per kind (5)")
    found.add_argument("--json", type=Path, help="where the results go, after every kind")
    found.add_argument("--task", help=argparse.SUPPRESS)
    return found


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.most < max(args.batches):
        parser().error(f"--most {args.most} is less than the largest of --batches")
    if args.task:
        task = json.loads(args.task)
        Path(task["answer"]).write_text(json.dumps(run_kind(task)))
        # What vLLM leaves running must not keep the next kind's memory.
        os._exit(0)
    from dataclasses import replace

    from benchmarks.gpu.models import LLAMA_8B, SMALL, dummy_model

    shape = SMALL if args.small else LLAMA_8B
    with tempfile.TemporaryDirectory() as folder:
        found = gate(Path(folder) / "gate", 60 * args.minutes)
        print(
            "mean differences of log-probabilities, 8-bit pages:",
            *(f"{k} {v:.4f}" for k, v in found.items()),
            flush=True,
        )
        if not max(found.values()) <= GATE_TOLERANCE:
            print(f"{GATE_TOLERANCE} are let through: the answers are wrong, and nothing is timed")
            return 1
        model = Path(folder) / "model"
        dummy_model(model, replace(shape, layers=args.layers or shape.layers))
        results = []
        for kind in args.kinds:
            print(kind, flush=True)
            task = {
                "kind": kind, "model": str(model), "gate": False, "contexts": args.contexts, "batches": args.batches,
                "fit_context": args.fit_context, "most": args.most, "kv_bytes": int(args.kv_gib * 2**30), "chunk": args.chunk,
            }  # fmt: skip
            results.append(in_a_process(task, 60 * args.minutes))
            print("\n".join(lines(results[-1], results[0])), flush=True)
            save(args.json, {"gate": found, "kv_gib": args.kv_gib, "shape": shape.config(), "kinds": results})
    return int(any("failed" in result for result in results))


def lines(result: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """What is printed of a kind, beside the first kind's steps."""
    if "failed" in result:
        return [f"  failed: {result['failed']}", *result["log"].splitlines()[-3:]]
    before = {(e["context"], e["batch"]): e.get("step_ms") for e in base.get("decode", [])}
    found = []
    for entry in result["decode"]:
        where = f"  context {entry['context']:6}, batch {entry['batch']:3}: "
        if "does_not_fit" in entry:
            found.append(f"{where}does not fit ({entry['does_not_fit']} would)")
            continue
        first = before.get((entry["context"], entry["batch"]))
        times = f", {first / entry['step_ms']:.2f} x {base['kind']}" if first else ""
        found.append(f"{where}{entry['step_ms']:8.2f} ms a step, {entry['tokens_per_second']:8.0f} tokens/s{times}")
    together = result["all_that_fit"]
    speed = f"; {together['batch']} at once: {together['tokens_per_second']:.0f} tokens/s" if together else ""
    return [*found, f"  {result['capacity_tokens']} tokens; {result['requests_that_fit']} requests fit{speed}"]


if __name__ == "__main__":
    sys.exit(main())
