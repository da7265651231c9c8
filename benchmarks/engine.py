"""Whole-engine decode and prefill, stock vLLM against ours, both alive and asked in turn.

``python -m benchmarks.engine PROFILE [--points 1x128 8x7168 ...] [--json FILE]``. Prompts are windows of real text, each
request's its own. Greedy text of a short request is compared first: an engine that answers nonsense is not timed.
``--chunk`` bounds the tokens of a step, on both sides; ``--new`` caches all but so many tokens of each prompt before it is
timed, so that its prefill is what follows a prefix hit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import save
from benchmarks.texts import write
from vllm_spectral.models.demo import demo_model

POINTS = ("1x128", "8x128", "32x128", "1x1024", "8x1024", "1x2048", "8x2048", "1x4000", "1x7168", "8x7168")
STEPS = 24
PROMPT = "The three most important inventions of the nineteenth century were"
POOL_BYTES = 3 << 30


def serve(profile: str, chunk: int, new: int) -> None:
    """The child: one engine, one JSON request per line, one JSON answer."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    answers, sys.stdout = sys.stdout, sys.stderr
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        str(demo_model(progress=False)), enforce_eager=True, block_size=32, max_model_len=8192, max_num_seqs=32,
        max_num_batched_tokens=chunk, kv_cache_memory_bytes=POOL_BYTES, enable_prefix_caching=new > 0,
        disable_log_stats=True, additional_config={"spectral": {"profile": profile}} if profile != "stock" else {},
    )  # fmt: skip
    attention = attention_clock(llm)
    tokenizer = llm.get_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        files = write("held-out", Path(folder)).values()
        ids = [i for file in files for i in tokenizer.encode(file.read_text(), add_special_tokens=False)]
    for line in sys.stdin:
        request = json.loads(line)
        if request["kind"] == "text":
            output = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
            answer: Any = output[0].outputs[0].text
        else:
            answer = measure(llm, ids, request["batch"], request["context"], request["round"], new, attention)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def attention_clock(llm: Any) -> list[float]:
    """A list of one number, the seconds that all layers' attention and their storing of keys and values have taken."""
    taken = [0.0]

    def timed(call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                taken[0] += time.perf_counter() - start

        return run

    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    for layer in context.values():
        for name in ("forward", "do_kv_cache_update"):
            if hasattr(layer.impl, name):
                setattr(layer.impl, name, timed(getattr(layer.impl, name)))
    return taken


def measure(
    llm: Any, ids: list[int], batch: int, context: int, round_: int, new: int, attention: list[float]
) -> dict[str, float]:
    """Seconds of prefill, and the median of decode steps in which all requests take part; attention's part of both too."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    parameters = SamplingParams(temperature=0, max_tokens=STEPS + 4, ignore_eos=True)
    # Cached prompts are of no round before.
    starts = [(index + (round_ * batch if new else 0)) * 2749 % (len(ids) - context) for index in range(batch)]
    prompts = [ids[start : start + context] for start in starts]
    if new:
        cached = [{"prompt_token_ids": prompt[: context - new]} for prompt in prompts]
        llm.generate(cached, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"{time.time_ns()}-{index}", {"prompt_token_ids": prompt}, parameters)
    prefill, of_prefill, steps, attended = 0.0, 0.0, [], []
    while engine.has_unfinished_requests():
        start_time, before = time.perf_counter(), attention[0]
        outputs = engine.step()
        taken = time.perf_counter() - start_time
        if len(outputs) == batch and all(len(o.outputs[0].token_ids) >= 2 for o in outputs):
            steps.append(taken)
            attended.append(attention[0] - before)
        elif not steps:
            prefill += taken
            of_prefill += attention[0] - before
    return {
        "prefill": prefill,
        "prefill_attention": of_prefill,
        "step": statistics.median(steps[:STEPS]),
        "attention": statistics.median(attended[:STEPS]),
    }


class Side:
    """The parent's end of one engine."""

    def __init__(self, profile: str, *flags: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.engine", "--serve", profile, *flags],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        )  # fmt: skip

    def ask(self, **request: Any) -> Any:
        """Send one request and wait for its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit("an engine died: run with --serve to see why")
        return json.loads(line)

    def stop(self) -> None:
        """Take the engine down."""
        self._process.kill()


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?")
    parser.add_argument("--points", nargs="+", default=POINTS, help="BATCHxCONTEXT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=8192, help="most tokens of a step (%(default)s)")
    parser.add_argument(
        "--new", type=int, default=0, help="tokens of a prompt that are not cached before; 0: nothing is"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.chunk, arguments.new)
        return
    if not arguments.profile:
        parser.error("a profile is needed: vllm-spectral calibrate demo -o PROFILE --preset balanced")
    flags = ("--chunk", str(arguments.chunk), "--new", str(arguments.new))
    sides = {"stock": Side("stock", *flags), "ours": Side(arguments.profile, *flags)}
    results = []
    try:
        texts = {name: side.ask(kind="text") for name, side in sides.items()}
        if texts["stock"].split()[:3] != texts["ours"].split()[:3]:
            raise SystemExit(f"the answers differ from the start: {texts}")
        for point in arguments.points:
            batch, context = map(int, point.split("x"))
            taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            for round_ in range(arguments.rounds + 1):
                for name, side in sides.items():
                    answer = side.ask(kind="measure", batch=batch, context=context, round=round_)
                    if round_ or batch * context > 20_000:  # the first round warms up, where that is cheap
                        taken[name].append(answer)
            ratio = {
                what: statistics.median(s[what] / o[what] for s, o in zip(taken["stock"], taken["ours"], strict=True))
                for what in ("step", "prefill")
            }
            sys.stdout.write(f"batch {batch:2d} context {context:5d}, tokens/s (attention of a step, of prefill): ")
            for name, answers in taken.items():
                of = {what: 1e3 * statistics.median(a[what] for a in answers) for what in answers[0]}
                decode = f"{of['attention']:.1f} of {of['step']:.1f}"
                prefill = f"{of['prefill_attention']:.0f} of {of['prefill']:.0f}"
                sys.stdout.write(f"{name} {1e3 * batch / of['step']:7.1f} ({decode} ms, {prefill} ms), ")
            sys.stdout.write(f"ratio {ratio['step']:.2f}; prefill ratio {ratio['prefill']:.2f}\n")
            sys.stdout.flush()
            results.append({"batch": batch, "context": context, "seconds": taken, "ratio": ratio})
            save(arguments.json, {"points": results, "chunk": arguments.chunk, "new": arguments.new})
    finally:
        for side in sides.values():
            side.stop()


if __name__ == "__main__":
    main()
