"""The documentation names tests that exist, and files that are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import hpcfs
from hpcfs.config import config, tunnel
from tests.policy.test_imports import MAY_IMPORT

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMED_FILE = re.compile(r"`([a-z_-]+/[a-z0-9_/.-]+\.(?:py|sh|toml|txt))`")
TRIED_TEST = re.compile(r"\bpytest (tests/[\w/]+\.py)(?:::(\w+))?")
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")


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
    for target, anchor in LINK.findall(page.read_text()):
        goal = page.parent / target if target else page
        assert goal.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(goal), f"{page.name} links to {target}#{anchor}"


def _anchors(page: Path) -> set[str]:
    """The ids that GitHub and others give to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def _promises(page: Path) -> list[str]:
    """The items of the lists below the lines "Promises:", each with the lines that continue it."""
    lists = page.read_text().split("\nPromises:\n\n")[1:]
    blocks = [text.split("\n\n")[0] for text in lists]
    assert all(block.startswith("- ") for block in blocks)
    return [item for block in blocks for item in re.split(r"^- ", block, flags=re.MULTILINE)[1:]]


@pytest.mark.parametrize(
    ("page", "at_least"), [("SECURITY.md", 30), ("docs/semantics.md", 170), ("docs/tunnel.md", 9)]
)
def test_each_promise_names_its_test(page: str, at_least: int) -> None:
    promises = _promises(ROOT / page)
    assert len(promises) >= at_least
    assert [promise for promise in promises if not NAMED_TEST.search(promise)] == []


@pytest.mark.parametrize(
    "key",
    sorted(
        {*config.TOP_KEYS, *config.SFTP_KEYS, *config.S3_KEYS, *config.TUNNEL_KEYS, *tunnel.KEYS}
    ),
)
def test_configuration_explains_each_key(key: str) -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    assert re.search(rf"^- `{key}` \([^)]*; [^)]*\): \S", text, re.MULTILINE)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_classes_that_a_page_names_exist(page: str) -> None:
    """Names in camel case, perhaps with an attribute."""
    named = re.findall(r"`([A-Z][a-z]+[A-Z]\w*)(?:\.(\w+))?`", (ROOT / page).read_text())
    sources = [*(ROOT / "hpcfs").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    words = set(re.findall(r"\w+", " ".join(source.read_text() for source in sources)))
    assert {word for both in named for word in both if word} - words == set()


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == hpcfs.__version__


def test_architecture_lists_the_layers_in_their_order() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    layers = text.split("\n## Layers\n")[1].split("\n## ")[0]
    assert re.findall(r"^- `(\w+)/`", layers, re.MULTILINE) == list(MAY_IMPORT)


def test_the_glossary_defines_each_word_once() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    words = re.findall(
        r"^\| ([^|]+) \|", text.split("| word | meaning |\n")[1].split("\n\n")[0], re.M
    )
    assert len(words) > 20
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_a_page_are_short(page: Path) -> None:
    """A word that can't be broken, such as a URL or the name of a test, may be longer."""
    lines = enumerate(page.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) >= 120 and " " in line.strip()] == []
