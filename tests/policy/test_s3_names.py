"""Keys and shown names: nothing is hidden, nothing is ambiguous."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given, strategies as st

from hpcfs.model.errors import InvalidName, NameTooLong
from hpcfs.remotes.base import is_valid_name
from hpcfs.remotes.s3.listing import Collator, Listed, in_order, is_marker
from hpcfs.remotes.s3.names import (
    BESIDE,
    ESCAPE,
    MARKER,
    checked_key,
    decoded,
    is_plain,
    parse,
    search_prefix,
    shown,
    stands_for,
)

PIECES = ["", ".", "..", "a", "\0", "ü", "%", ESCAPE.decode(), BESIDE.decode(), MARKER, "0" * 16]
characters = st.characters(exclude_characters="/", exclude_categories=["Cs"])
components = st.one_of(
    st.text(characters, max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
    st.text(st.sampled_from("ax\0ü?"), min_size=200, max_size=300),
)


@given(components, st.booleans())
@example("", False)
@example("..", True)
@example("a" * 255, False)
@example("a" * 255, True)
@example("ü" * 127, True)
def test_every_component_is_shown_under_a_name_that_leads_back(
    component: str, beside: bool
) -> None:
    name = shown(component, beside=beside)
    assert is_valid_name(name)
    found = parse(name)
    assert found.beside is beside
    if found.component is None:
        assert stands_for(name, component)
        assert component.startswith(search_prefix(name))
    else:
        assert found.component == component


@given(components, components, st.booleans(), st.booleans())
def test_two_things_never_share_a_name(a: str, b: str, beside_a: bool, beside_b: bool) -> None:
    same = shown(a, beside=beside_a) == shown(b, beside=beside_b)
    assert same is ((a, beside_a) == (b, beside_b))


@given(st.binary(min_size=1, max_size=40).filter(is_valid_name))
def test_ordinary_names_are_shown_as_they_are(name: bytes) -> None:
    if ESCAPE in name:
        assert not is_plain(name)
        return
    try:
        component = decoded(name)
    except InvalidName:
        assert name.decode(errors="replace").encode() != name
        return
    assert shown(component) == name
    assert parse(name).component == component


@pytest.mark.parametrize(
    "name",
    [b"a%hpcfs-", b"a%hpcfs-xyz", b"%hpcfs-object", b"a%hpcfs-directory", b"..%hpcfs-object"],
)
def test_reserved_names_that_stand_for_nothing_are_refused(name: bytes) -> None:
    with pytest.raises(InvalidName, match="reserved"):
        parse(name)


def test_names_that_s3_cannot_hold() -> None:
    with pytest.raises(InvalidName, match="UTF-8"):
        parse("Bär".encode("latin-1"))
    assert checked_key("ü" * 512) == "ü" * 512
    with pytest.raises(NameTooLong, match="1024 bytes"):
        checked_key("ü" * 512 + "x")


# --- what a directory shows ---------------------------------------------------------------------

keys = st.lists(
    st.text(st.sampled_from("ab-!/~"), min_size=1, max_size=6), max_size=30, unique=True
).map(sorted)


def listing(all_keys: list[str]) -> list[tuple[str, str | None]]:
    """What S3 answers with a delimiter, as one ordered list."""
    objects = [(key, key) for key in all_keys if "/" not in key]
    prefixes = sorted({key.partition("/")[0] + "/" for key in all_keys if "/" in key})
    return list(in_order(objects, prefixes))


def collated(names: list[tuple[str, str | None]]) -> list[Listed[str]]:
    collator: Collator[str] = Collator()
    found: list[Listed[str]] = []
    for name, item in names:
        found += collator.prefix(name) if item is None else collator.object(name, item)
    return found + list(collator.end())


@given(keys)
@example(["a", "a!x", "a-b", "a/x", "a~"])
@example(["a", "aa", "aa/x", "a~", "b"])
def test_the_stream_finds_the_same_collisions_as_a_model_that_sees_everything(
    all_keys: list[str],
) -> None:
    directories = {key.partition("/")[0] for key in all_keys if "/" in key}
    files = {key for key in all_keys if "/" not in key}
    expected = {(name, False, False) for name in directories}
    expected |= {(name, True, name in directories) for name in files}
    found = collated(listing(all_keys))
    assert len(found) == len(expected)
    assert {(one.component, one.item is not None, one.beside) for one in found} == expected


@given(keys)
def test_only_names_that_begin_with_each_other_are_held_back(all_keys: list[str]) -> None:
    collator: Collator[str] = Collator()
    for name, item in listing(all_keys):
        list(collator.prefix(name) if item is None else collator.object(name, item))
        held = [held_name for held_name, _ in collator._held]
        assert all(longer.startswith(short) for short, longer in pairwise(held))
    assert len(list(collator.end())) <= 7


@given(keys, st.randoms())
def test_a_server_that_does_not_sort_loses_nothing(all_keys: list[str], random: object) -> None:
    names = listing(all_keys)
    random.shuffle(names)  # type: ignore[attr-defined]
    found = collated(names)
    assert sorted(one.item for one in found if one.item is not None) == sorted(
        key for key in all_keys if "/" not in key
    )


def test_a_prefix_that_is_listed_twice_is_one_directory() -> None:
    assert collated([("a/", None), ("a/", None)]) == [Listed("a", None)]


def test_only_empty_objects_are_markers() -> None:
    assert is_marker("", 0)
    assert is_marker(MARKER, 0)
    assert not is_marker("", 1)
    assert not is_marker(MARKER, 1)
    assert not is_marker("a", 0)
