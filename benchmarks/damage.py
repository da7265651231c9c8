"""What the probes say of sound and of damaged profiles: where the limits of alarms belong.

Every layer of a profile is damaged in the same way, and the model answers exactly meanwhile, so that each layer is probed on
sound activations as if it were the only one. Text is held out from calibration; 256 tokens a window.

    python -m benchmarks.damage balanced.spectral quality.spectral --windows 4
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.texts import write as write_texts
from vllm_spectral.cli.common import quiet_vllm
from vllm_spectral.codec.codebook import Codebooks
from vllm_spectral.config import SpectralConfig
from vllm_spectral.models.demo import demo_model
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.schema import Profile
from vllm_spectral.profile.storage import load_profile, save_profile

WINDOW = 256


def transposed(part: str) -> Callable[[Profile], Profile]:
    """One basis used as ``h @ U.T``."""
    return lambda profile: dataclasses.replace(
        profile,
        layers=tuple(
            dataclasses.replace(layer, **{part: getattr(layer, part).mT.contiguous()}) for layer in profile.layers
        ),
    )


def foreign(profile: Profile) -> Profile:
    """Every layer with the bases of the layer seven places on."""
    layers = profile.layers
    moved = layers[7:] + layers[:7]
    return dataclasses.replace(
        profile,
        layers=tuple(
            dataclasses.replace(layer, key_basis=other.key_basis, value_basis=other.value_basis)
            for layer, other in zip(layers, moved, strict=True)
        ),
    )


def zeroed(profile: Profile) -> Profile:
    """Codebooks of zeros."""
    return dataclasses.replace(profile, codebooks=Codebooks(torch.zeros_like(profile.codebooks.levels)))


DAMAGE: dict[str, Callable[[Profile], Profile]] = {
    "sound": lambda profile: profile,
    "keys' basis transposed": transposed("key_basis"),
    "values' basis transposed": transposed("value_basis"),
    "another layer's bases": foreign,
    "codebooks of zeros": zeroed,
}


def probe(profile: str, texts: list[str], windows: int, answer: Any) -> None:
    """In a process of its own: every probe of every layer and window."""
    quiet_vllm(False)
    from vllm_spectral.backend.engine import OfflineEngine

    engine = OfflineEngine(
        ModelDescription.from_directory(demo_model(progress=False)),
        SpectralConfig(Path(profile), fidelity_every=0),
        max_model_len=WINDOW + 1, max_num_seqs=1, kv_cache_tokens=8192,
    )  # fmt: skip
    engine.rpc("spectral_answer_exactly", True)
    found = []
    for text in texts:
        ids = engine.tokenize(text)
        for index in range(windows):
            start = index * (len(ids) - WINDOW) // max(windows - 1, 1)
            engine.rpc("spectral_expect_canary", WINDOW)
            engine.run([ids[start : start + WINDOW]])
            (report,) = engine.rpc("spectral_fidelity")
            found += report["history"]
    answer.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="of prose, and as many of code (4)")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("| profile | damage | error ratio | drift | fallback share | output error |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        texts = [path.read_text() for path in write_texts("held-out", Path(folder)).values()]
        for path in arguments.profiles:
            for name, damage in DAMAGE.items():
                damaged = Path(folder) / "damaged.spectral"
                save_profile(damage(load_profile(path)), damaged)
                answer = context.Queue()
                process = context.Process(
                    target=probe, args=(str(damaged), texts, arguments.windows, answer), daemon=True
                )
                process.start()
                probes = answer.get()
                process.kill()
                cells = []
                for figure in ("error_ratio", "drift", "fallback_share", "output_error"):
                    values = torch.tensor([entry[figure] for entry in probes])
                    cells.append(f"{values.min():.3f} to {values.max():.3f}")
                print(f"| {path.stem} | {name} | {' | '.join(cells)} |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
