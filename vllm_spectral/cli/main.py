"""``vllm-spectral``: the entry point of the command line."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from vllm_spectral import __version__
from vllm_spectral.cli import calibrate, demo_model, doctor, evaluate, inspect, serve, top
from vllm_spectral.errors import SpectralError

_COMMANDS = (calibrate, inspect, serve, top, evaluate, doctor, demo_model)
_EPILOG = """\
typical use:
  vllm-spectral doctor demo                            can this model be served?
  vllm-spectral calibrate demo -o demo.spectral        once per model
  vllm-spectral inspect demo.spectral --plot demo.png  what was learned
  vllm-spectral serve demo --profile demo.spectral     an OpenAI server on port 8000
  vllm-spectral top http://localhost:8000              what its cache costs and does, live

MODEL is a directory, a hub name (owner/name), or the word demo: SmolLM2-135M-Instruct, embedded.
Bad input is answered by one line and exit code 2, before any model is loaded.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands."""
    parser = argparse.ArgumentParser(
        prog="vllm-spectral",
        description="Serve models with stock vLLM from spectrally rotated, quantized KV pages.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM raise SystemExit, as SIGINT raises KeyboardInterrupt: what was started is taken down.

    Until a server serves, and has ways of its own to stop. In a container, whose first process ignores signals that it does
    not handle, nothing would happen at all while a model is loaded.
    """

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "passes_flags_on", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        with _ended_by_sigterm():
            code: int = args.run(args)
    except SpectralError as error:
        print(f"vllm-spectral: error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())
