"""From users to GPUs: how many hold the load's KV cache, how many read it fast enough, how many compute it.

``python -m benchmarks.scaling`` prints the tables of ``docs/scaling.md`` (``--write`` puts them and the plot there); flags
change every assumption. Nothing is measured here: see ``benchmarks/bounds.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.bounds import ACCELERATORS, CACHES, LOADS, PARAMETERS, Load, Machine, Model, need

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
PLOT = DOCUMENT.parent / "images" / "scaling.png"


def table(load: Load, models: Sequence[Model], machine: Machine, users: Sequence[float]) -> str:
    """A table of GPUs, every cell with what asks for them."""
    names = " | ".join(f"{count:,.0f} users" for count in users)
    lines = [f"| model | cache | requests at once, a replica | {names} |", "|---|---|---|" + "---|" * len(users)]
    for model in models:
        ranks = machine.ranks(model, load)
        where = f"{model.name}, {ranks} GPU{'s' * (ranks > 1)} a replica"
        for cache in CACHES:
            few = cache.tokens_in(machine.cache_memory(model, ranks), model, ranks) / load.context
            needs = [need(count, load, model, cache, machine) for count in users]
            cells = " | ".join(f"{each.gpus:,} ({each.binds})" for each in needs)
            lines.append(f"| {where} | {cache.name} | {few:,.1f} | {cells} |")
            where = ""
    return "\n".join(lines) + "\n"


def verdict(load: Load, model: Model, machine: Machine, users: float) -> str:
    """One sentence: what a smaller cache saves there, and where it stops to."""
    needs = {cache.name: need(users, load, model, cache, machine) for cache in CACHES}
    told, last = [], None
    for name, each in needs.items():
        if last is None or each.gpus < last.gpus:
            told.append(f"{each.gpus:,} with {name}")
            last = each
    assert last is not None
    if len(told) > 1:
        end = f"; then {last.binds} binds" if last.binds in ("compute", "bandwidth") else ""
        return f"{model.name}, {users:,.0f} users: {', '.join(told)}{end}."
    why = f"{last.binds} binds" if last.binds in ("compute", "bandwidth") else "replicas are whole"
    why = "one replica is enough" if last.binds == "one replica" else why
    return f"{model.name}, {users:,.0f} users: **nothing is saved**, {why} ({last.gpus:,})."


def document(models: Sequence[Model], machine: Machine, users: Sequence[float], loads: Sequence[Load]) -> str:
    """All tables and their sentences."""
    parts = []
    for load in loads:
        parts += [f"**{load.name.capitalize()}**: {load.summary}\n", table(load, models, machine, users)]
        parts.append(
            "\n".join(f"- {verdict(load, model, machine, count)}" for model in models for count in users) + "\n"
        )
    return "\n".join(parts)


def plot(models: Sequence[Model], machine: Machine, loads: Sequence[Load], path: Path) -> None:
    """GPUs over users, for every model and load."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    users = [10 ** (3 + step / 20) for step in range(81)]
    figure, axes = plt.subplots(
        len(models), len(loads), figsize=(4 * len(loads), 3.2 * len(models)), squeeze=False, sharex=True
    )
    for row, model in zip(axes, models, strict=True):
        for axis, load in zip(row, loads, strict=True):
            for cache in CACHES:
                line = [need(count, load, model, cache, machine).gpus for count in users]
                axis.loglog(users, line, label=cache.name.strip("`"), linewidth=1.3)
            axis.set_title(f"{model.name}, {load.name}: {load.prompt:,} + {load.answer:,} tokens", fontsize=9)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("users")
    for row in axes:
        row[0].set_ylabel(f"{machine.accelerator.name}s")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _meaning(kind: type, name: str) -> str:
    """What a field's class says of it."""
    found = re.search(rf"^ +{name}: (.*?)\.\n(?: {{8}}\w+:|    $|\Z)", kind.__doc__ or "", re.DOTALL | re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _default(kind: type, field: dataclasses.Field[Any]) -> str:
    if kind is Load and len({getattr(load, field.name) for load in LOADS.values()}) > 1:
        return "by load"
    return f"{field.default:g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print, or write the document's part."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=(__doc__ or "").split("\n\n")[0],
        epilog=f"loads: {', '.join(LOADS)}",
    )
    parser.add_argument(
        "--models", nargs="+", choices=PARAMETERS, default=["Llama-3.1-8B", "Llama-3.1-70B"], metavar="MODEL"
    )
    parser.add_argument("--gpu", choices=ACCELERATORS, default="H100-80GB")
    parser.add_argument("--users", nargs="+", type=float, default=[1e3, 1e5, 1e7])
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS), metavar="LOAD")
    for kind, group in ((Load, "a load: in place of the named ones'"), (Machine, "a replica")):
        flags = parser.add_argument_group(group)
        for field in dataclasses.fields(kind):
            if field.type in ("int", "float"):
                text = f"{_meaning(kind, field.name)} ({_default(kind, field)})".replace("%", "%%")
                flags.add_argument(f"--{field.name.replace('_', '-')}", type=float, metavar="NUMBER", help=text)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}, with the plot")
    args = parser.parse_args(argv)

    def given(kind: type) -> dict[str, Any]:
        names = [field.name for field in dataclasses.fields(kind)]
        return {name: value for name in names if (value := getattr(args, name, None)) is not None}

    loads = [dataclasses.replace(LOADS[name], **given(Load)) for name in args.loads]
    machine = Machine(ACCELERATORS[args.gpu], **given(Machine))
    models = [Model.named(name) for name in args.models]
    try:
        text = document(models, machine, args.users, loads)
    except ValueError as error:
        parser.error(str(error))
    if not args.write:
        sys.stdout.write(text)
        return 0
    old = DOCUMENT.read_text()
    DOCUMENT.write_text(
        re.sub(r"(<!-- generated -->\n).*(<!-- /generated -->)", lambda m: m[1] + text + m[2], old, flags=re.DOTALL)
    )
    plot(models, machine, loads, PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
