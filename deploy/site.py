"""Makes the repository's documents into one site: a hook of mkdocs, see ``mkdocs.yml`` and ``make docs``.

The README is the first page; it, the other documents at the root and the benchmarks' results become pages where they lie, and
links between them, which are right in the repository, are made right on the site.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
RESULTS = "benchmarks/results"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)(?=[)#])")


def place(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    if path in MOVED:
        return MOVED[path]
    if path.startswith(RESULTS):
        return "results" + path.removeprefix(RESULTS)
    return path.removeprefix("docs/")


def relinked(markdown: str, path: str) -> str:
    """A document with the links that it has on the site.

    Args:
        markdown: its text.
        path: where it lies in the repository.
    """
    here = PurePosixPath(path).parent

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(here / match[1])
        return os.path.relpath(place(target), PurePosixPath(place(path)).parent)

    return _LINK.sub(moved, markdown)


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside of ``docs/``."""
    from mkdocs.structure.files import File

    results = sorted(
        str(path.relative_to(ROOT)) for path in (ROOT / RESULTS).glob("*") if path.suffix in (".md", ".json")
    )
    for path in (*MOVED, *results):
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_others: Any) -> str:
    """Set the links right."""
    return relinked(markdown, os.path.relpath(page.file.abs_src_path, ROOT))
