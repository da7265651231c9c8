"""``vllm-spectral evaluate``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_spectral.cli.common import (
    MODEL_HELP,
    add_exact,
    add_exempt,
    add_verbose,
    described,
    exact_fields,
    exempt_layers,
    for_workers,
    load_for,
    print_json,
    quiet_vllm,
)
from vllm_spectral.errors import ConfigError
from vllm_spectral.versions import require_tested_vllm

if TYPE_CHECKING:
    from vllm_spectral.evaluation.run import CandidateResult

_DESCRIPTION = """\
Compare answers from compressed pages with those of an exact cache, through the real engine, on the same windows of
text in one run. Every token reads what it would read when it is generated: its window exactly, the rest compressed.
Use text that the profiles were not calibrated on.

--against adds what else there is: bf16 and fp8 (vLLM's own caches, by its own kernels; bf16 shows what arithmetic
alone changes) and references of rivals (turboquant_k4v4, ..., int4_per_token_head). A rival has the same exact tier as
the profiles; with /strict appended to its name, none. "all" stands for all of these.
"""
_EPILOG = """\
examples:
  vllm-spectral evaluate demo --profile demo.spectral --text prose.txt
  vllm-spectral evaluate demo --profile quality.spectral balanced.spectral --against all --text prose.txt code.txt \\
      --context 2048 --windows 8 --greedy 8 --haystacks 4 --markdown table.md --plot plots/ --json > figures.json
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="fidelity of profiles on your text, and of what else there is",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--profile", metavar="PROFILE", type=Path, nargs="+", required=True, help="made by `calibrate`")
    parser.add_argument("--text", metavar="FILE", type=Path, nargs="+", required=True, help="UTF-8 text")
    parser.add_argument("--against", metavar="CACHE", nargs="+", default=[], help="other caches by name, or all")
    parser.add_argument("--strict", action="store_true", help="each profile without the exact tier, too")
    add_exempt(parser)
    parser.add_argument("--context", type=int, default=1024, help="tokens per window (1024)")
    parser.add_argument("--windows", type=int, default=8, help="most windows per file, spread evenly over it (8)")
    more = parser.add_argument_group("further questions")
    more.add_argument(
        "--greedy",
        metavar="N",
        type=int,
        default=0,
        help="greedy continuations per text: how long they stay the same (0)",
    )
    more.add_argument("--greedy-tokens", metavar="N", type=int, default=128, help="their length (128)")
    more.add_argument("--haystacks", metavar="N", type=int, default=0, help="texts with hidden numbers, per length (0)")
    more.add_argument("--needles", metavar="N", type=int, default=5, help="numbers hidden in each (5)")
    more.add_argument(
        "--retrieval-contexts",
        metavar="N",
        type=int,
        nargs="+",
        help="their lengths (1024, doubled up to the model's limit)",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON instead of tables")
    output.add_argument(
        "--markdown", metavar="FILE", type=Path, help="write the tables as Markdown, too, after each cache"
    )
    output.add_argument("--plot", metavar="FOLDER", type=Path, help="write rate-distortion and position plots there")
    add_exact(parser)
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    require_tested_vllm()
    quiet_vllm(args.verbose)
    from vllm_spectral.evaluation.candidates import named, of_profile
    from vllm_spectral.evaluation.report import markdown, plot, to_json
    from vllm_spectral.evaluation.run import Plan, evaluate

    model = described(args.model)
    model.require_supported()
    exact = exact_fields(args)
    first, recent = exact["exact_first_tokens"], exact["exact_recent_tokens"]
    if exact["exact_bytes"] == 0:
        first = recent = 0
    paths = [for_workers(path) for path in args.profile]
    profiles = [load_for(model, path) for path in paths]
    exempt = exempt_layers(args, model)
    candidates = [
        of_profile(profile, path, first=first, recent=recent, exempt=exempt, strict=strict)
        for strict in ((False, True) if args.strict and (first or recent) else (False,))
        for profile, path in zip(profiles, paths, strict=True)
    ]
    candidates += named(args.against, model.head_dim, first=first, recent=recent)
    lengths = args.retrieval_contexts or [c for c in (2**n for n in range(10, 21)) if c < model.max_positions]
    if not args.retrieval_contexts and model.max_positions - 1 not in lengths:
        lengths.append(model.max_positions - 1)
    plan = Plan(
        tuple(args.text), args.context, args.windows, args.greedy, args.greedy_tokens,
        args.haystacks, tuple(lengths), args.needles,
    )  # fmt: skip
    for file in (args.markdown, args.plot):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {file}: {file.parent} is no directory")
    done: list[CandidateResult] = []

    def keep(result: CandidateResult) -> None:
        done.append(result)
        for text in result.texts:
            sys.stderr.write(
                f"{result.candidate.name}, {text.text}: perplexity {text.delta_percent:+.2f} %, KL {text.kl:.4f}, "
                f"top-1 {100 * text.top1:.1f} %\n"
            )
        if args.markdown:
            args.markdown.write_text(markdown(done), encoding="utf-8")

    results = evaluate(model, candidates, plan, verbose=args.verbose, on_result=keep)
    table = markdown(results)
    if args.markdown:
        args.markdown.write_text(table, encoding="utf-8")
    if args.plot:
        plot(results, args.plot)
    if args.json:
        listed = to_json(results)
        print_json(
            {
                "model": args.model,
                # The first profile's results, where a single profile's always were.
                "profile": {
                    "name": profiles[0].name,
                    "digest": profiles[0].digest,
                    "bits_per_element": profiles[0].bits_per_element,
                },
                "context": args.context,
                "texts": listed[0]["texts"],
                "candidates": listed,
            }
        )
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(table))
    else:
        sys.stdout.write(table)
    return 0
