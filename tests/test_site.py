"""Links that are right in the repository are right on the site."""

from __future__ import annotations

import pytest

from deploy.site import place, relinked


@pytest.mark.parametrize(
    ("path", "link", "on_the_site"),
    [
        ("README.md", "docs/quality.md", "quality.md"),
        ("README.md", "docs/architecture.md#the-flow", "architecture.md#the-flow"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("docs/quality.md", "images/a.png", "images/a.png"),
        ("docs/quality.md", "../benchmarks/results/a.md", "results/a.md"),
        ("docs/releases.md", "../CHANGELOG.md", "changelog.md"),
        ("benchmarks/results/a.md", "../../docs/quality.md", "../quality.md"),
        ("docs/quality.md", "https://example.org/a.md", "https://example.org/a.md"),
        ("docs/quality.md", "#here", "#here"),
    ],
)
def test_links(path: str, link: str, on_the_site: str) -> None:
    assert relinked(f"see [this]({link}) and `code`", path) == f"see [this]({on_the_site}) and `code`"


def test_the_readme_is_the_first_page() -> None:
    assert place("README.md") == "index.md"
