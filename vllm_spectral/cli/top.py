"""``vllm-spectral top``."""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from datetime import datetime
from typing import TYPE_CHECKING, Any

from vllm_spectral.cli.client import KEY_VARIABLE, Server, UnreachableError, address
from vllm_spectral.cli.common import print_json
from vllm_spectral.cli.frame import Frame
from vllm_spectral.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

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
    server = Server(address(args.url), args.api_key or os.environ.get(KEY_VARIABLE) or None)
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
