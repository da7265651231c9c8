"""Data flows one way, and so do imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vllm_spectral"
SERVER = ROOT / "server" / "vllm_spectral_server"

ORDER = (
    "errors", "versions", "config", "progress", "remote", "codec", "kernels", "rivals", "models", "profile", "exact", "stats",
    "backend", "plugin", "calibration", "evaluation", "cli",
)  # fmt: skip
"""A part imports itself and what stands before it, as in docs/architecture.md; the server comes after all."""

LAUNCHES_SERVER = PACKAGE / "cli" / "serve.py"
"""The one place where a later part is called: the command hands over to the server."""


def sources(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module imported anywhere in a file, in functions as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the rule"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    names = module.split(".")
    return names[1] if names[0] == "vllm_spectral" and len(names) > 1 and names[1] in ORDER else None


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_part_imports_only_what_stands_before_it(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if here == "__init__":
        return
    for module in imported(path):
        other = part(module)
        assert other is None or ORDER.index(other) <= ORDER.index(here), f"{path} imports {module}"
        assert not module.startswith("vllm_spectral_server") or path == LAUNCHES_SERVER, f"{path} imports {module}"


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_backend_and_the_plugin_import_vllm_and_nothing_imports_fastapi(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    roots = {module.split(".")[0] for module in imported(path)}
    assert "fastapi" not in roots
    assert "vllm" not in roots or here in ("backend", "plugin")


@pytest.mark.parametrize("path", sources(PACKAGE / "codec"), ids=lambda p: p.name)
def test_the_codec_imports_torch_alone(path: Path) -> None:
    allowed = {"torch", "vllm_spectral", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in imported(path)} <= allowed
    assert all(part(module) in (None, "codec") for module in imported(path))


@pytest.mark.parametrize("path", sources(SERVER), ids=lambda p: p.name)
def test_the_server_is_imported_by_nobody_else(path: Path) -> None:
    assert not {m.split(".")[0] for m in imported(path)} & {"tests", "server"}


def test_every_part_is_in_the_order() -> None:
    parts = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert parts - {"__init__"} == set(ORDER)


@pytest.mark.parametrize(
    "module", ["vllm_spectral.plugin", "vllm_spectral.cli.main", "vllm_spectral.config", "vllm_spectral.versions"]
)
def test_cheap_imports_stay_cheap(module: str) -> None:
    """vLLM loads the plugin in every process, and --help must answer at once."""
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'vllm', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
