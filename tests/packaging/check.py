"""Builds the sdist and, from it alone, the wheel; installs the wheel outside of the checkout and uses it there.

    python -m tests.packaging.check --pythons python3.11 python3.12 python3.13

For every Python the commands answer and the kernels load. Where torch and vLLM can be installed as pinned, `doctor demo`
judges the embedded model, the server answers from a profile made there, and the tests of kernels, codec and profiles run on
the installed package. Where torch's CPU build is not to be had, --cuda-torch takes the other build of the same version, which
computes on the CPU as well and brings gigabytes of CUDA with it; without that flag the last line says so, and that Python is
shown to install, and no more.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = ROOT / "requirements"
COMMANDS = ("calibrate", "inspect", "serve", "top", "evaluate", "doctor", "demo-model")
LIGHT = ("rich", "safetensors", "pydantic", "numpy", "packaging")
"""What the command line itself asks for, for Pythons without a torch."""
TESTS = ("kernels/test_store.py", "kernels/test_library.py", "codec", "profile")
HELPERS = ("__init__.py", "conftest.py", "tolerances.py", "kernels", "codec", "profile", "fuzz")
LOADS = """
import ctypes, pathlib, sys, vllm_spectral
folder = pathlib.Path(vllm_spectral.__file__).parent / "kernels"
found = sorted(folder.glob("*.so"))
portable = ctypes.CDLL(str(folder / "vllm_spectral_portable.so"))
portable.vs_machine_isas.restype = portable.vs_isa.restype = ctypes.c_char_p
machine = portable.vs_machine_isas().decode().split(",")
names = {path.stem.removeprefix("vllm_spectral_") for path in found}
assert portable.vs_isa() == b"portable" and set(machine) <= names, (machine, names)
print(f"{len(found)} kernel libraries; this machine runs {', '.join(machine)}")
"""
SERVES = """
import json, subprocess, urllib.request
from pathlib import Path
from deploy.process import command, running
subprocess.run(command("calibrate", "demo", "-o", "here.spectral", "--preset", "instant"), check=True)
argv = command("serve", "demo", "--profile", "here.spectral", "--kv-cache-memory-bytes", "64M", "--max-model-len", "2048")
with running(argv, Path("log")) as server:
    body = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(body).encode(), headers)
    text = json.load(urllib.request.urlopen(request))["choices"][0]["text"]
    assert "Paris" in text, text
    print(f"{server.get('/v1/kv_cache/memory')['capacity_tokens']} tokens in 64 MiB, and {text!r}")
"""


def run(*argv: str | Path, cwd: Path, quiet: bool = True) -> str:
    """Run a command; its output.

    Raises:
        SystemExit: with the output, if it fails.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        [str(part) for part in argv],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=clean,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, argv))} failed with {result.returncode}:\n{result.stdout[-6000:]}")
    if not quiet:
        print(result.stdout.strip(), flush=True)
    return result.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it alone."""
    print("building the sdist, and the wheel from it", flush=True)
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT, cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    isas = re.findall(r"^\s*add_kernels\((\w+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
    wanted = (
        *(f"vllm_spectral/kernels/vllm_spectral_{isa}.so" for isa in isas),
        "vllm_spectral_server/static/index.html",
        "vllm_spectral/py.typed",
    )
    missing = [name for name in wanted if name not in names]
    stray = [name for name in names if name.startswith(("tests/", "benchmarks/", "deploy/")) or name.endswith(".cpp")]
    if missing or stray:
        raise SystemExit(f"{wheel.name} lacks {missing} and has no use for {stray}")
    print(f"{sdist.name}: {sdist.stat().st_size >> 10} KiB; {wheel.name}: {wheel.stat().st_size >> 10} KiB", flush=True)
    return sdist, wheel


def use(python: str, wheel: Path, folder: Path, index: Sequence[str], cuda_torch: bool) -> str:
    """Install and use the wheel with one Python; what was shown."""
    home = folder / python.replace("/", "-")
    home.mkdir()
    run(python, "-m", "venv", home / "venv", cwd=home)
    bin_ = home / "venv" / "bin"
    pip = [bin_ / "pip", "install", "--quiet", "--disable-pip-version-check"]
    version = run(bin_ / "python", "--version", cwd=home).strip()
    run(*pip, "--no-deps", wheel, cwd=home)
    pins = _pins()
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    as_pinned, other_build = _can_install(bin_, home, index, torch), torch.removesuffix("+cpu")
    whole = as_pinned or cuda_torch
    what = "all pins" if as_pinned else f"no {torch} for it: the build for CUDA" if whole else "the command line alone"
    print(f"{version}: installing {what}", flush=True)
    if not whole:
        run(*pip, *LIGHT, cwd=home)
    else:
        if not as_pinned:
            # With what it needs, which is in no file of ours.
            run(*pip, other_build, cwd=home)
            pins.remove(torch)
        (home / "pins").write_text("\n".join(pins))
        run(*pip, *index, "--no-deps", "-r", home / "pins", cwd=home)
    command = bin_ / "vllm-spectral"
    shown = run(command, "--version", cwd=home).strip()
    for name in COMMANDS:
        assert "usage: vllm-spectral" in run(command, name, "--help", cwd=home)
    libraries = run(bin_ / "python", "-I", "-c", LOADS, cwd=home).strip()
    result = f"{version}: {shown}, --help of {len(COMMANDS)} commands, {libraries}"
    if not whole:
        return result + "; torch and vLLM: NOT RUN"
    verdict = run(command, "doctor", "demo", cwd=home)
    assert "demo" in verdict or "llama" in verdict
    (home / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "process.py", home / "deploy")
    served = run(bin_ / "python", "-c", SERVES, cwd=home).strip().splitlines()[-1]
    (home / "tests").mkdir()
    for name in HELPERS:
        source = ROOT / "tests" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, home / "tests" / name)
    tests = [f"tests/{name}" for name in TESTS]
    last = (
        run(bin_ / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=home).strip().splitlines()[-1]
    )
    build = "" if as_pinned else f", {other_build} for CUDA"
    return f"{result}; doctor demo; served: {served}; kernels, codec, profiles{build}: {last}"


def _pins() -> list[str]:
    """All of them, a package each."""
    lines = (line for name in ("runtime", "cpu") for line in (PINS / f"{name}.lock").read_text().splitlines())
    return [line for line in lines if re.match(r"\w", line)]


def _can_install(bin_: Path, home: Path, index: Sequence[str], pin: str) -> bool:
    """Whether a build can be had for this Python."""
    argv = [
        bin_ / "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--dry-run",
        "--no-deps",
        "--only-binary=:all:",
    ]
    return subprocess.run([*argv, *index, pin], cwd=home, capture_output=True, check=False).returncode == 0


def main() -> int:
    """Build, use, say in one line per Python what was shown."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.packaging.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pythons", nargs="+", default=["python3.11"], help="interpreters, one environment each (%(default)s)"
    )
    parser.add_argument(
        "--torch-index", default="", help="where torch's CPU build is found, if the package index lacks it"
    )
    parser.add_argument(
        "--cuda-torch", action="store_true", help="take torch's build for CUDA where there is none for the CPU"
    )
    parser.add_argument("--keep", type=Path, help="put sdist and wheel there as well")
    arguments = parser.parse_args()
    index = ["--extra-index-url", arguments.torch_index] if arguments.torch_index else []
    results = []
    with tempfile.TemporaryDirectory() as name:
        made = Path(name) / "dist"
        made.mkdir()
        sdist, wheel = build(made)
        if arguments.keep:
            arguments.keep.mkdir(parents=True, exist_ok=True)
            for file in (sdist, wheel):
                shutil.copy(file, arguments.keep)
        for python in arguments.pythons:
            if shutil.which(python) is None:
                results.append(f"{python}: NOT RUN, it is not installed")
                continue
            results.append(use(python, wheel, Path(name), index, arguments.cuda_torch))
            # One at a time: an environment with torch takes gigabytes.
            shutil.rmtree(Path(name) / python.replace("/", "-"))
    print("\n".join(f"package: {result}" for result in results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
