"""Which folders `hpcfs tunnel --share ...` shares, and what it says about those it can't."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from hpcfs.laptop.shares import Share, collect, parse
from hpcfs.model.errors import SetupError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """With ~/data, ~/src and ~/src/sub."""
    found = tmp_path.resolve() / "home"
    (found / "src" / "sub").mkdir(parents=True)
    (found / "data").mkdir()
    return found


@pytest.mark.parametrize(
    ("text", "name", "place", "read_only"),
    [
        ("~/data", "data", "data", False),
        ("~/data:ro", "data", "data", True),
        ("data/", "data", "data", False),
        ("code=~/src", "code", "src", False),
        ("code=src:ro", "code", "src", True),
        ("a b=src", "a b", "src", False),
        ("x=y=z=src/../src", "", "", False),
        ("home=~", "home", "", False),
        ("~", "home", "", False),
        ("./src/sub", "sub", "src/sub", False),
    ],
)
def test_the_forms_of_a_share(
    home: Path, text: str, name: str, place: str, read_only: bool
) -> None:
    if not name:
        with pytest.raises(SetupError, match="does not exist"):
            parse(text, home, home)
    else:
        assert parse(text, home, home) == Share(name, (home / place).resolve(), read_only)


def test_a_folder_with_an_equals_sign_is_shared_under_its_own_name(home: Path) -> None:
    (home / "a=b").mkdir()
    assert parse("a=b", home, home) == Share("a=b", home / "a=b")


def test_a_variable_is_expanded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT", str(home / "src"))
    assert parse("code=$PROJECT/sub", home, home).directory == home / "src" / "sub"


def test_a_link_is_shared_as_what_it_leads_to(home: Path) -> None:
    (home / "link").symlink_to("data")
    assert parse("link", home, home) == Share("link", home / "data")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("missing", "does not exist"),
        ("", "names no folder"),
        ("name=", "names no folder"),
        (":ro", "names no folder"),
        ("file", "is no folder"),
        ("/", "needs a name"),
        ("round", "does not exist"),
        ("n" * 300, "does not exist"),
        ("n" * 5000 + "=data", "needs a name"),
        ("é" * 200 + "=data", "needs a name"),
        ("a\nb=data", "needs a name"),
        (".=data", "needs a name"),
        ("..=data", "needs a name"),
        ("a\0=data", "needs a name"),
        ("\udcff=data", "needs a name"),
    ],
)
def test_what_cannot_be_shared_is_said_in_a_sentence(home: Path, text: str, words: str) -> None:
    (home / "file").touch()
    (home / "round").symlink_to("round")
    with pytest.raises(SetupError, match=words):
        parse(text, home, home)


def test_a_name_is_as_long_as_a_file_name(home: Path) -> None:
    assert parse("é" * 100 + "=data", home, home).name == "é" * 100
    with pytest.raises(SetupError, match="needs a name"):
        parse("é" * 127 + "xx=data", home, home)


@settings(max_examples=300)
@given(text=st.text(max_size=30) | st.text("ab=:~/.ro$\0é\udcff", max_size=12))
def test_any_text_is_a_share_or_refused(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    home = tmp_path_factory.getbasetemp().resolve() / "any"
    (home / "a" / "b").mkdir(parents=True, exist_ok=True)
    try:
        share = parse(text, home, home)
    except SetupError:
        return
    assert share.directory.is_dir()
    assert share.directory == share.directory.resolve()
    assert share.name not in ("", ".", "..")
    assert "/" not in share.name
    assert len(share.name.encode()) <= 255


def test_without_a_share_it_is_the_folder_one_is_in(home: Path) -> None:
    assert collect((), home / "data", home) == (Share("data", home / "data"),)


@pytest.mark.parametrize("place", [".", "..", "/"])
def test_a_home_directory_is_shared_only_by_name(home: Path, place: str) -> None:
    with pytest.raises(SetupError, match="say which folder"):
        collect((), home / place, home)
    assert collect(("~",), home, home) == (Share("home", home),)


def test_one_name_is_one_share(home: Path) -> None:
    with pytest.raises(SetupError, match="two shares are named data"):
        collect(("~/data", "data=src"), home, home)


@pytest.mark.parametrize("texts", [("src", "src/sub:ro"), ("one=src", "two=src:ro")])
def test_what_is_shared_read_only_is_not_shared_otherwise(
    home: Path, texts: tuple[str, ...]
) -> None:
    with pytest.raises(SetupError, match="shared read-only, and could be changed through"):
        collect(texts, home, home)


def test_a_part_of_a_read_only_share_may_be_writable(home: Path) -> None:
    shares = collect(("src:ro", "src/sub", "data"), home, home)
    assert [share.read_only for share in shares] == [True, False, False]
    assert os.fspath(shares[1].directory).startswith(os.fspath(shares[0].directory))
