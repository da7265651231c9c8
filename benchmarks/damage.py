"""What the canary says of sound and of damaged profiles: are its limits between them?

Every layer of a profile is damaged in the same way, and the model answers exactly meanwhile, so that each layer is probed on
sound activations as if it were the only one; a sound profile is also probed as it is served. The figures of the canary's
tokens are held against what the profile says of them.

    python -m benchmarks.damage balanced.spectral quality.spectral
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
from vllm_spectral_server.canary import DRIFT_SLACK, RATIO_SLACK

from vllm_spectral.cli.common import quiet_vllm
from vllm_spectral.codec.codebook import Codebooks
from vllm_spectral.config import SpectralConfig
from vllm_spectral.models.demo import demo_model
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.schema import Profile
from vllm_spectral.profile.storage import load_profile, save_profile
from vllm_spectral.stats.canary import MOST_TOKENS, TEXT


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


def probe(profile: str, exactly: bool, answer: Any) -> None:
    """In a process of its own: what is found in every layer."""
    quiet_vllm(False)
    from vllm_spectral.backend.engine import OfflineEngine

    engine = OfflineEngine(
        ModelDescription.from_directory(demo_model(progress=False)),
        SpectralConfig(Path(profile), fidelity_every=0),
        max_model_len=MOST_TOKENS + 1, max_num_seqs=1, kv_cache_tokens=8192,
    )  # fmt: skip
    ids = engine.tokenize(TEXT, special=True)[:MOST_TOKENS]
    engine.rpc("spectral_answer_exactly", exactly)
    engine.rpc("spectral_expect_canary", len(ids))
    engine.run([ids])
    (report,) = engine.rpc("spectral_fidelity")
    answer.put(report["history"])


def look(profile: Profile, exactly: bool) -> list[dict[str, Any]]:
    """What is found in every layer of a profile."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.spectral"
        save_profile(profile, path)
        answer = context.Queue()
        process = context.Process(target=probe, args=(str(path), exactly, answer), daemon=True)
        process.start()
        probes: list[dict[str, Any]] = answer.get()
        process.kill()
    return probes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", nargs="+", type=Path)
    arguments = parser.parse_args()
    print("| profile | damage | error ratio over the expected | drift beside the expected | layers seen |")
    print("|---|---|---|---|---|")
    for path in arguments.profiles:
        profile = load_profile(path)
        if (expected := profile.expectation) is None:
            parser.error(f"{path} says nothing of the canary")
        cases = [("sound, as served", profile, False)]
        cases += [(name, damage(profile), True) for name, damage in DAMAGE.items()]
        for name, damaged, exactly in cases:
            ratios, drifts = [], []
            for found in look(damaged, exactly):
                ratio, drift = expected.of_layer(found["layer"], 1)
                ratios.append(found["error_ratio"] / ratio)
                drifts.append(found["drift"] - drift)
            seen = sum(r > RATIO_SLACK or d > DRIFT_SLACK for r, d in zip(ratios, drifts, strict=True))
            print(
                f"| {path.stem} | {name} | {min(ratios):.3f} to {max(ratios):.3f} | {min(drifts):.4f} to {max(drifts):.4f} | "
                f"{seen} of {len(ratios)} |"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
