"""The profiles behind ``docs/quality.md``.

Usage: ``python -m benchmarks.quality DIRECTORY`` measures the demo model once on the built-in prompts and writes one
profile per budget, and Hadamard profiles of some; ``vllm-spectral calibrate`` makes the same ones, one at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_spectral.calibration.run import CalibrationRequest, build, measure
from vllm_spectral.models.demo import demo_model
from vllm_spectral.models.description import ModelDescription
from vllm_spectral.profile.storage import save_profile

SPECTRAL_BITS = (2.0, 2.5, 3.0, 3.5, 4.0)
HADAMARD_BITS = (2.0, 3.0, 4.0)


def main(directory: Path) -> None:
    """Write all profiles."""
    directory.mkdir(parents=True, exist_ok=True)
    model = ModelDescription.from_directory(demo_model())
    measured = measure(CalibrationRequest(model, "builtin"))
    for bits in SPECTRAL_BITS:
        request = CalibrationRequest(model, f"spectral-{bits:g}", bits)
        save_profile(build(request, measured), directory / f"{request.name}.spectral")
    for bits in HADAMARD_BITS:
        request = CalibrationRequest(model, f"hadamard-{bits:g}", bits, "hadamard")
        save_profile(build(request, None), directory / f"{request.name}.spectral")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
