"""A frame of ``vllm-spectral top``: the server's figures as a terminal shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from vllm_spectral.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

WORST_LAYERS = 5
NONE = "–"
PARTS = (
    ("used", "used_bytes", "█", "cyan"),
    ("cached but free", "cached_bytes", "▓", "blue"),
    ("free pages", "free_bytes", "░", "bright_black"),
    ("exact tier", "exact_tier_bytes", "▚", "yellow"),
    ("workspace", "workspace_bytes", "▞", "magenta"),
    ("profile", "profile_bytes", "▤", "green"),
)
"""Name, key, and how it is drawn: a sign of its own, since colours alone are not for everyone."""
ALARM = "bold red"
MEMORY_WIDTH = 36
"""Characters of the table of parts, the space after it included."""


def size(value: float) -> str:
    """Bytes as people read them."""
    power = 0 if value < 1024 else min(5, int(math.log2(value) / 10))
    unit = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")[power]
    scaled = value / 1024**power
    return f"{scaled:.0f} {unit}" if power == 0 or scaled >= 100 else f"{scaled:#.3g} {unit}"


def number(value: float | None) -> str:
    """Three digits; a dash where there is no sample yet."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def clock(seconds: float) -> str:
    """A moment in local time, with the date if it was not today."""
    moment, now = datetime.fromtimestamp(seconds), datetime.now()
    return f"{moment:%H:%M:%S}" if moment.date() == now.date() else f"{moment:%Y-%m-%d %H:%M:%S}"


def widths(sizes: Sequence[float], full: float, width: int) -> list[int]:
    """Sizes as numbers of characters, so that a bar of ``full`` has ``width`` and no part that exists disappears."""
    ends = [round(width * sum(sizes[: i + 1]) / full) if full else 0 for i in range(len(sizes))]
    parts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    for i, value in enumerate(sizes):
        if value > 0 and parts[i] == 0 and max(parts) > 1:
            parts[parts.index(max(parts))] -= 1
            parts[i] = 1
    return parts


def spark(values: Sequence[float | None]) -> str:
    """A series as blocks of eight heights; a gap where there is no value."""
    peak = max((value for value in values if value is not None), default=0)
    return "".join(" " if v is None else "▁▂▃▄▅▆▇█"[round(7 * v / peak) if peak else 0] for v in values)


@dataclass
class Frame:
    """What is shown at one moment.

    Attributes:
        url: the server's address.
        bodies: its answers, see :meth:`Server.bodies`.
        rates: generated tokens per second of the frames before, oldest first.
        lost: why there are no newer answers; empty if these are the newest.
    """

    url: str
    bodies: dict[str, Any]
    rates: Sequence[float | None] = field(default_factory=list)
    lost: str = ""

    def render(self, console: Console) -> RenderableType:
        """The frame for a terminal of this size.

        Raises:
            ConfigError: if the bodies are not of this version.
        """
        try:
            return self._render(console.width)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(
                f"the figures of {self.url} are not understood ({type(error).__name__} {error}): "
                "is the server another version of vllm-spectral?"
            ) from error

    def _render(self, width: int) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[RenderableType] = [*self._state(), Text(), self._memory_bar(width)]
        if width >= 80:
            columns = Table.grid(padding=(0, 2, 0, 0), expand=True)
            columns.add_column(width=MEMORY_WIDTH)
            columns.add_column(ratio=1)
            columns.add_row(self._memory_table(), Group(*self._tokens(min(width, 120) - MEMORY_WIDTH - 3)))
            parts.append(columns)
        else:
            parts += [self._memory_table(), Text(), *self._tokens(width)]
        parts += [*self._ranks(), Text(), self._traffic(), Text(), *self._layers()]
        return Group(*parts)

    def _state(self) -> list[Text]:
        from rich.text import Text

        memory, ready = self.bodies["memory"], self.bodies["ready"]
        profile = memory["profile"]
        what = f"{profile['name']} {profile['digest'][:12]} · {memory['kernels']}" if profile else "stock cache"
        lines = [Text.assemble((memory["model"], "bold"), f" · {what} · {self.url}")]
        if self.lost:
            return [*lines, Text(f"■ {self.lost}; trying again", ALARM)]
        reason = "" if ready["reason"].lower() in ("", "ready") else f": {ready['reason']}"
        if ready["ready"]:
            lines.append(Text.assemble(("● ", "green"), f"ready{reason}"))
        else:
            lines.append(Text(f"■ not ready{reason}", ALARM))
        lines[-1].append(f" · {self._canary(ready['canary'])}", "default")
        for alarm in self.bodies["fidelity"]["alarms"]:
            place = "" if alarm["layer"] is None else f" in layer {alarm['layer']}"
            lines.append(Text(f"▲ alarm, {alarm['kind']}{place}: {alarm['message']}", ALARM))
        return lines

    @staticmethod
    def _canary(canary: dict[str, Any]) -> str:
        text = f"canary {canary['state']}"
        if canary["time"] is not None:
            text += f" at {clock(canary['time'])}"
        if canary["kl"] is not None:
            text += f", KL {number(canary['kl'])} of at most {number(canary['kl_limit'])}"
        if canary["top1_agreement"] is not None:
            text += f", top-1 {canary['top1_agreement']:.1%}"
        if canary["worst_drift"] is not None:
            text += f", drift {canary['worst_drift']:.1%} of at most {canary['drift_limit']:.0%}"
        return text

    def _memory_bar(self, width: int) -> Text:
        from rich.text import Text

        memory = self.bodies["memory"]
        sizes = [memory[key] for _, key, _, _ in PARTS]
        lengths = widths(sizes, sum(sizes), width)
        return Text.assemble(
            *((sign * length, style) for length, (_, _, sign, style) in zip(lengths, PARTS, strict=True)),
            no_wrap=True, overflow="crop",
        )  # fmt: skip

    def _memory_table(self) -> Table:
        from rich.text import Text

        memory = self.bodies["memory"]
        full = memory["resident_bytes"]
        table = _columns("", ">", ">")
        for name, key, sign, style in PARTS:
            label = Text.assemble((sign, style), f" {name}")
            table.add_row(label, size(memory[key]), f"{memory[key] / full:.1%}" if full else NONE)
        table.add_row(Text("  together", "bold"), Text(size(full), "bold"))
        return table

    def _tokens(self, width: int) -> list[RenderableType]:
        from rich.text import Text

        memory = self.bodies["memory"]
        held = [memory["used_tokens"], memory["cached_tokens"]]
        dense = memory["uncompressed_capacity_tokens"]
        capacities = (
            ("this cache", memory["capacity_tokens"], held),
            ("fp8", memory["fp8_capacity_tokens"], [0, 0]),
            ("bf16", dense, [0, 0]),
        )
        full = max(tokens for _, tokens, _ in capacities)
        room = max(4, width - len("this cache") - len(f"{full:,}") - len("10.00 ×") - 6)
        table = _columns("", "", ">", ">")
        for name, tokens, (used, cached) in capacities:
            lengths = widths([used, cached, max(0, tokens - used - cached)], full, room)
            drawn = zip(lengths, PARTS, strict=False)
            bar = Text.assemble(*((sign * length, style) for length, (_, _, sign, style) in drawn))
            table.add_row(name, bar, f"{tokens:,}", f"{tokens / dense:.2f} ×" if dense else NONE)
        free = max(0, memory["capacity_tokens"] - sum(held))
        ratio, bits = memory["effective_compression_ratio"], memory["effective_bits_per_element"]
        return [
            table,
            Text(f"tokens: {held[0]:,} used, {held[1]:,} cached, {free:,} free"),
            Text(f"{memory['bytes_per_token']:,} bytes per token in the pages"),
            Text(f"{ratio:.2f} × bf16, {bits:.2f} bits, all counted"),
        ]

    def _ranks(self) -> list[RenderableType]:
        from rich.text import Text

        ranks = self.bodies["memory"]["ranks"]
        if len(ranks) < 2:
            return []
        table = _columns(
            "", ">", ">", ">", ">", ">", head=("rank", "pages", "exact", "workspace", "profile", "process")
        )
        keys = ("pool_bytes", "exact_tier_bytes", "workspace_bytes", "profile_bytes", "process_bytes")
        for rank in ranks:
            name = f"DP {rank['data_parallel_rank']}, TP {rank['tensor_parallel_rank']}"
            table.add_row(name, *(size(rank[key]) for key in keys))
        return [Text(), table]

    def _traffic(self) -> Text:
        from rich.text import Text

        traffic = self.bodies["traffic"]
        text = Text.assemble(
            ("running ", "dim"), f"{traffic['running']:,}", ("  waiting ", "dim"), f"{traffic['waiting']:,}",
            ("  generated ", "dim"), f"{number(traffic['generated_tokens_per_second'])} tokens/s",
            ("  prompt ", "dim"), f"{number(traffic['prompt_tokens_per_second'])} tokens/s",
            ("  preemptions ", "dim"), f"{traffic['preemptions']:,}",
        )  # fmt: skip
        if len(self.rates) > 1:
            text.append("\n").append("generated ", "dim").append(spark(self.rates), "cyan")
        return text

    def _layers(self) -> list[RenderableType]:
        from rich.text import Text

        fidelity = self.bodies["fidelity"]
        if self.bodies["memory"]["profile"] is None:
            return [Text("stock cache: keys and values are kept as they are, there is no fidelity to measure", "dim")]
        if not fidelity["every_steps"]:
            return [Text("fidelity is not sampled by this server", "dim")]
        alarms: dict[int, list[str]] = {}
        for alarm in fidelity["alarms"]:
            if alarm["layer"] is not None:
                alarms.setdefault(alarm["layer"], []).append(alarm["kind"])
        sampled = [layer for layer in fidelity["layers"] if layer["error_ratio"] is not None]
        if not sampled and not alarms:
            return [Text(f"no step was sampled yet; about one in {fidelity['every_steps']} is", "dim")]
        worst = sorted(
            (layer for layer in fidelity["layers"] if layer in sampled or layer["layer"] in alarms),
            key=lambda layer: (layer["layer"] not in alarms, -(layer["error_ratio"] or 0.0)),
        )
        sampling = f"about one step in {fidelity['every_steps']:,} is sampled, {fidelity['sampled_steps']:,} so far"
        head = ("layer", "output error", "KL", "error ratio", "drift", "alarm")
        table = _columns(">", ">", ">", ">", ">", "", head=head)
        for layer in worst[:WORST_LAYERS]:
            alarm = ", ".join(alarms.get(layer["layer"], ()))
            figures = (number(layer[key]) for key in ("output_error", "attention_kl", "error_ratio", "drift"))
            mark = Text(f"▲ {alarm}" if alarm else "", ALARM)
            table.add_row(str(layer["layer"]), *figures, mark, style="bold" if alarm else "")
        return [Text(f"worst layers; {sampling}", "dim"), table]


def _columns(*alignments: str, head: Sequence[str] = ()) -> Table:
    """A table without lines; ``">"`` aligns a column to the right."""
    from rich.table import Table

    table = Table(box=None, show_header=bool(head), header_style="dim", padding=(0, 2, 0, 0), pad_edge=False)
    for i, alignment in enumerate(alignments):
        table.add_column(head[i] if head else "", justify="right" if alignment == ">" else "left", no_wrap=True)
    return table
