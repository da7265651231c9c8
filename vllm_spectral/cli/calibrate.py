"""``vllm-spectral calibrate``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from vllm_spectral.calibration.presets import DEFAULT_PRESET, PRESETS
from vllm_spectral.cli.common import MODEL_HELP, add_verbose, described, quiet_vllm, warn
from vllm_spectral.versions import require_tested_vllm

_DESCRIPTION = """\
Measure a model's keys and values and write a profile.

Without --text, the model answers built-in prompts (prose, code, mathematics, dialogue, several languages) and is
measured on the result: no data set is needed. With --text it is measured on your files; text like that which you will
serve gives the best profile. With --from-traffic URL it is not measured at all: a running server hands over the second
moments that it gathered from what it serves (moments only, no text). --basis hadamard measures nothing and needs neither.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "calibrate",
        help="measure a model and write its profile",
        description=_DESCRIPTION,
        epilog="presets:\n" + "\n".join(f"  {name:<10} {p.bits:g} bits, {p.summary}" for name, p in PRESETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("-o", "--output", metavar="PROFILE", type=Path, required=True, help="file to write")
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help=f"bits and basis by name, see below ({DEFAULT_PRESET}; with --from-traffic the bits of what is served there)",
    )
    parser.add_argument("--bits", type=float, help="stored bits per KV element, scales included (the preset's)")
    parser.add_argument("--basis", choices=("spectral", "hadamard"), help="kind of basis (the preset's)")
    parser.add_argument("--text", metavar="FILE", type=Path, nargs="+", default=[], help="your own UTF-8 text")
    parser.add_argument(
        "--from-traffic", metavar="URL", help="take what the vllm-spectral server at URL gathered from its live traffic"
    )
    parser.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get("VLLM_API_KEY"), help="that server's key ($VLLM_API_KEY)"
    )
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal profiles (0)")
    add_verbose(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Calibrate and save."""
    require_tested_vllm()
    quiet_vllm(args.verbose)
    from vllm_spectral.calibration.run import CalibrationRequest, calibrate
    from vllm_spectral.profile.storage import require_writable, save_profile

    require_writable(args.output)
    preset = PRESETS[args.preset or DEFAULT_PRESET]
    bits = args.bits
    if bits is None and (args.preset or not args.from_traffic):
        bits = preset.bits
    request = CalibrationRequest(
        model=described(args.model),
        name=args.output.stem,
        bits=bits,
        basis=args.basis or preset.basis,
        texts=tuple(args.text),
        traffic=args.from_traffic,
        api_key=args.api_key,
        seed=args.seed,
    )
    profile = save_profile(calibrate(request, warn=warn), args.output)
    sys.stdout.write(
        f"{args.output}: {profile.bits_per_element:.2f} bits per element, {profile.slot_bytes} bytes per token and "
        f"KV head (bf16: {4 * profile.fingerprint.head_dim}), measured on {profile.provenance.num_tokens} tokens, "
        f"digest {profile.digest[:12]}\n"
    )
    return 0
