"""How the cost of decode attention grows with context and batch: ours, vLLM's own bf16 and fp8 kernels, and the floor.

``python -m benchmarks.growth PROFILE [--json FILE] [--plot FILE]``. One layer and one step of all requests, as in
:mod:`benchmarks.kernels` and gated like there; the floor is reading our bytes. Shapes: a layer of the embedded model
(3 KV heads, 3 query heads each, head size 64) and one of a model of some 8 billion parameters (8, 4 and 128).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import Bench, Case
from benchmarks.measure import ratios, save
from vllm_spectral.kernels.library import isas
from vllm_spectral.profile.storage import load_profile

SHAPES = {"3 x 3 x 64": (3, 3, 64), "8 x 4 x 128": (8, 4, 128)}
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
BATCHES = (1, 2, 4, 8, 16, 32)
BATCH_CONTEXT = 2048
SIDES = {"bf16": "stock bf16", "fp8": "stock fp8", "ours": "ours", "read": "reading our bytes"}


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Microseconds per token against context, and against batch, a row per shape."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(SHAPES), 2, figsize=(10, 7), sharey="row", layout="constrained")
    for (name, shape), row in zip(SHAPES.items(), axes, strict=True):
        for axis, what, title in zip(
            row, ("context", "batch"), ("1 request", f"{BATCH_CONTEXT} tokens per request"), strict=True
        ):
            chosen = [p for p in points if p["grows"] == what and tuple(p["shape"]) == shape]
            for side, label in SIDES.items():
                per_token = [[1e6 * t / p["batch"] for t in p["seconds"][side]] for p in chosen]
                places = [p[what] for p in chosen]
                style = ":" if side == "read" else "-"
                (line,) = axis.plot(places, [statistics.median(t) for t in per_token], style, marker=".", label=label)
                axis.fill_between(places, *zip(*((min(t), max(t)) for t in per_token), strict=True),
                                  color=line.get_color(), alpha=0.15, linewidth=0)  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel="context, tokens" if what == "context" else "requests",
                     title=f"{name}, {title}")  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.grid(alpha=0.3)
        row[0].set_ylabel("microseconds per output token and layer")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measure all points, then draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="PNG")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    profile, isa = load_profile(arguments.profile), isas()[0]
    points: list[dict[str, Any]] = []
    for shape in SHAPES.values():
        sweep = [("context", Case(*shape, context, 1)) for context in CONTEXTS]
        sweep += [("batch", Case(*shape, BATCH_CONTEXT, batch)) for batch in BATCHES]
        for grows, case in sweep:
            result = Bench(case, profile, isa).compare(rounds=7)
            taken = result["seconds"]
            points.append({"grows": grows, "shape": shape, "context": case.context, "batch": case.batch, **result})
            sys.stdout.write(
                f"{case}: ours {1e6 * statistics.median(taken['ours']) / case.batch:.1f} us per token, bf16 / ours "
                f"{ratios(taken['bf16'], taken['ours']):.2f}, fp8 / ours {ratios(taken['fp8'], taken['ours']):.2f}, "
                f"{100 * ratios(taken['read'], taken['ours']):.0f} % of the read limit\n"
            )
            sys.stdout.flush()
    save(arguments.json, {"isa": isa, "threads": arguments.threads, "bits": profile.bits_per_element, "points": points})
    if arguments.plot:
        plot(points, arguments.plot)


if __name__ == "__main__":
    main()
