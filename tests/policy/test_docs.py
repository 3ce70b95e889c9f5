"""The documentation names tests that exist, and files that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMED_FILE = re.compile(r"`([a-z_-]+/[a-z0-9_/.-]+\.(?:py|sh|toml|txt))`")
TRIED_TEST = re.compile(r"\bpytest (tests/[\w/]+\.py)(?:::(\w+))?")
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for file, name in NAMED_TEST.findall(text) + TRIED_TEST.findall(text):
        assert (ROOT / file).is_file(), f"{page.name} names {file}"
        if name:
            assert re.search(rf"^(async )?def {name}\b", (ROOT / file).read_text(), re.MULTILINE), (
                f"{page.name} names {file}::{name}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """By their paths in the repository, or below hpcfs/."""
    named = NAMED_FILE.findall(page.read_text())
    missing = [
        name for name in named if not any((top / name).is_file() for top in (ROOT, ROOT / "hpcfs"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_security_names_the_test_of_each_promise() -> None:
    tables = (ROOT / "SECURITY.md").read_text().split("| promise | test |\n")[1:]
    rows = [row for table in tables for row in table.split("\n\n")[0].splitlines()[1:]]
    assert len(rows) > 20
    assert [row for row in rows if not NAMED_TEST.search(row)] == []


def test_semantics_names_the_test_of_each_promise() -> None:
    rows = [
        line
        for line in (ROOT / "docs" / "semantics.md").read_text().splitlines()
        if line.startswith("| ") and "test_" in line
    ]
    assert rows
    assert all(NAMED_TEST.search(row) for row in rows)
