"""``vllm-spectral top``."""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from vllm_spectral.cli.common import print_json
from vllm_spectral.errors import ConfigError
from vllm_spectral.remote import NoRedirects

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

KEY_VARIABLE = "VLLM_API_KEY"
TIMEOUT = 10.0
"""Seconds until an answer counts as missing."""
WORST_LAYERS = 5
_DESCRIPTION = f"""\
Watch a running `vllm-spectral serve`: where each byte of the cache is, the tokens it holds against bf16 and fp8 in the
same bytes, whether the canary still gives the exact cache's answers, alarms, the layers that lose most, and traffic.
The page at URL/dashboard shows the same and more in a browser. Ctrl-C leaves.

The server's --api-key is needed here as well: from --api-key, or better from the environment variable {KEY_VARIABLE},
which other users of the machine cannot see in the list of processes.
"""
_EPILOG = """\
examples:
  vllm-spectral top http://localhost:8000                     until Ctrl-C
  vllm-spectral top localhost:8000 --once                     one frame, for a log or a bug report
  vllm-spectral top localhost:8000 --once --json | jq .memory.used_tokens

How to read it:
  used             pages held by requests; when they and the cached pages fill the pool, requests wait
  cached but free  pages that only prefix hits read; they are given away when a request needs them
  exact tier       uncompressed copies of first and recent tokens
  error ratio      squared error of keys and values over what the profile predicts: 1 is as calibrated, and far above 1
                   the traffic is unlike the text of the calibration
  canary           a fixed prompt, answered again and again and compared with the exact cache's answer
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "top",
        help="watch a running server: memory, tokens, fidelity, traffic",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", metavar="URL", help="of the server, with the prefix of a proxy if there is one")
    parser.add_argument("--api-key", metavar="KEY", help=f"the server's key (${KEY_VARIABLE})")
    parser.add_argument("--interval", metavar="SECONDS", type=_seconds, default=2.0, help="between frames (2)")
    parser.add_argument("--once", action="store_true", help="print one frame and leave")
    parser.add_argument("--json", action="store_true", help="with --once: the routes' bodies as one JSON document")
    parser.set_defaults(run=run)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise ValueError
    return value


_seconds.__name__ = "number of seconds from 0.1 to 3600"


def run(args: argparse.Namespace) -> int:
    """Print one frame, or keep showing the newest."""
    if args.json and not args.once:
        raise ConfigError("--json needs --once: a live view has no end at which a document would be complete")
    server = Server(_address(args.url), args.api_key or os.environ.get(KEY_VARIABLE) or None)
    if args.json:
        print_json(server.bodies() | {"profile": server.profile()})
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    if args.once:
        console.print(Frame(server.url, server.bodies()).render(console))
        return 0
    if not console.is_terminal:
        raise ConfigError("top needs a terminal: use --once to print one frame, --once --json for a program")
    return _watch(console, server, args.interval)


def _watch(console: Console, server: Server, interval: float) -> int:
    from rich.live import Live

    rates: deque[float | None] = deque(maxlen=30)
    frame = Frame(server.url, server.bodies(), rates)
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                rates.append(None if frame.lost else frame.bodies["traffic"]["generated_tokens_per_second"])
                live.update(frame.render(console), refresh=True)
                time.sleep(interval)
                try:
                    frame = Frame(server.url, server.bodies(), rates)
                except UnreachableError as error:
                    lost = frame.lost or f"{error.cause} since {datetime.now():%H:%M:%S}"
                    frame = Frame(server.url, frame.bodies, rates, lost)
    except KeyboardInterrupt:
        return 0


# ------------------------------------------------------------------------------------------------------------- asking


class UnreachableError(ConfigError):
    """The server does not answer, or not at the moment: worth another try.

    Attributes:
        cause: the message without the advice.
    """

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"{cause}: {advice}")
        self.cause = cause


def _address(url: str) -> str:
    """The server's address without a final slash; the scheme may be left out, and an OpenAI client's ``/v1`` may stay."""
    full = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(full)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        named = False
    if not named or parts.query or parts.fragment:
        raise ConfigError(f"{url} is not the address of a server: it looks like http://localhost:8000")
    return full.rstrip("/").removesuffix("/v1").removesuffix("/dashboard").rstrip("/")


class Server:
    """A server that is asked for its figures."""

    def __init__(self, url: str, key: str | None = None) -> None:
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("the API key holds characters that no key can have: only printable ASCII")
        self.url = url
        self.key = key
        self._opener = urllib.request.build_opener(NoRedirects)

    def bodies(self) -> dict[str, Any]:
        """What a frame shows, by the last part of the path.

        Raises:
            ConfigError: if the server refuses, or is none of ours.
            UnreachableError: if it does not answer.
        """
        answers = {"memory": self.get("v1/kv_cache/memory"), "ready": self.get("ready")}
        answers |= {name: self.get(f"v1/kv_cache/{name}") for name in ("fidelity", "traffic")}
        return answers

    def profile(self) -> dict[str, Any] | None:
        """The active profile, or None where the stock cache is served."""
        profile: dict[str, Any] | None = self.get("v1/kv_cache/profile", may_be_absent=True)
        return profile

    def get(self, path: str, *, may_be_absent: bool = False) -> Any:
        """The parsed body of a GET; None if the route may be absent and is."""
        request = urllib.request.Request(f"{self.url}/{path}")
        if self.key is not None:
            request.add_header("Authorization", f"Bearer {self.key}")
        try:
            with self._opener.open(request, timeout=TIMEOUT) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404 and may_be_absent:
                    return None
                if error.code != 503 or path != "ready":
                    raise self._refusal(error.code, path) from None
                content = error.read()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            cause = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise UnreachableError(
                f"no answer from {self.url} ({cause})", "is `vllm-spectral serve` running there, on that port?"
            ) from None
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise self._foreign(path)
        return body

    def _refusal(self, status: int, path: str) -> ConfigError:
        if status == 401:
            if self.key is None:
                return ConfigError(f"{self.url} asks for an API key: give it by --api-key, or set {KEY_VARIABLE}")
            return ConfigError(f"{self.url} does not accept the API key that --api-key or {KEY_VARIABLE} gives")
        if status >= 500:
            return UnreachableError(f"{self.url} answers {status} for /{path}", "its log, or a proxy's, says why")
        if status == 404:
            return self._foreign(path)
        return ConfigError(f"{self.url} answers {status} for /{path}: is this the server's own address?")

    def _foreign(self, path: str) -> ConfigError:
        return ConfigError(
            f"{self.url} is not a vllm-spectral server of this version: it has no figures at /{path} "
            "(stock vLLM has none; behind a proxy, its prefix belongs to the URL)"
        )


# ------------------------------------------------------------------------------------------------------------ drawing

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
