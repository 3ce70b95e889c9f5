"""What listings tell of names, for how long, and when a directory is listed for that."""

from __future__ import annotations

import stat

import msgspec
import pytest

from hpcfs.directories import listing_cache, lookup_rate
from hpcfs.directories.listing import Listing
from hpcfs.directories.listing_cache import ListingCache
from hpcfs.directories.lookup_rate import PAUSE_SECONDS, LookupRate
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS, Node
from hpcfs.model.entries import Entry

FILE = Entry(b"", stat.S_IFREG | 0o644, 1, 0, 0, 1, 1, b"v")


def folder() -> Node:
    return Node(2, None, b"d", None, FILE)


def listing(*names: bytes, asked: float = 100.0) -> Listing:
    made = Listing("/nonexistent", asked)
    made.add_page(msgspec.msgpack.encode([msgspec.structs.replace(FILE, name=n) for n in names]))
    made.check_complete()
    return made


def test_a_listing_tells_of_its_names_for_a_second() -> None:
    known, node = ListingCache(), folder()
    known.put(node, listing(b"a"), 100.1)
    found = known.find(node, b"a", 100.5)
    assert found is not None
    assert found[0] == 100.0
    assert found[1] is not None
    assert known.find(node, b"b", 100.5) == (100.0, None)
    assert known.find(folder(), b"a", 100.5) is None
    assert known.find(node, b"a", 100.01 + ATTRIBUTE_SECONDS) is None
    assert not len(known)


def test_it_does_not_tell_of_names_that_were_changed_or_that_servers_hide() -> None:
    known, node = ListingCache(), folder()
    known.put(node, listing(b"a"), 100.1)
    known.changed(node, b"a")
    known.changed(node, b"b")
    for name in (b"a", b"b", b".snapshot"):
        assert known.find(node, name, 100.5) is None
    assert known.find(node, b"c", 100.5) == (100.0, None)


def test_an_older_listing_that_comes_later_does_not_count() -> None:
    known, node = ListingCache(), folder()
    known.put(node, listing(asked=100.2), 100.3)
    known.put(node, listing(b"a", asked=100.1), 100.4)
    assert known.find(node, b"a", 100.5) == (100.2, None)


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = listing(*[b"%d" % number for number in range(100)])
    monkeypatch.setattr(listing_cache, "MAX_BYTES", 5 * one.size)
    monkeypatch.setattr(listing_cache, "MAX_INDEXED", 250)
    known, nodes = ListingCache(), [folder() for _ in range(9)]
    listings = [listing(*[b"%d" % number for number in range(100)]) for _ in nodes]
    for node, made in zip(nodes, listings, strict=True):
        known.put(node, made, 100.1)
    assert len(known) == 5
    for node in nodes[4:]:
        assert known.find(node, b"7", 100.2) is not None
        assert sum(made.has_index for made in listings) <= 2
    known.expire(102.0)
    assert not len(known)
    assert not any(made.has_index for made in listings)


def uses(times: list[float], node: Node, policy: LookupRate) -> list[bool]:
    return [policy.note(node, time) for time in times]


def test_four_names_at_once_make_a_directory_worth_listing() -> None:
    policy, node = LookupRate(), folder()
    assert uses([100.0, 100.1, 100.2, 100.3], node, policy) == [False, False, False, True]
    assert policy.begin(node, 100.3)
    assert uses([100.3, 100.3], node, policy) == [False, False], "it is under way"


def test_rare_questions_are_asked_one_by_one() -> None:
    policy, node = LookupRate(), folder()
    assert not any(uses([100.0 + second for second in range(50)], node, policy))


def test_a_listing_in_use_is_renewed() -> None:
    policy, node = LookupRate(), folder()
    policy.listed(node, listing(b"a"), 100.1)
    assert uses([100.2, 100.3, 100.4], node, policy) == [False] * 3
    assert uses([100.6], node, policy) == [True]
    other = folder()
    policy.listed(other, listing(b"a"), 100.1)
    assert uses([105.0, 105.1], other, policy) == [False, True], "it was listed a moment ago"


def test_a_large_directory_must_be_used_more() -> None:
    policy, node = LookupRate(), folder()
    policy.listed(node, listing(*[b"%d" % number for number in range(5000)]), 100.1)
    answers = uses([102.0 + 0.01 * use for use in range(30)], node, policy)
    assert 8 < answers.index(True) < 15


def test_what_could_not_be_listed_in_time_is_left_alone() -> None:
    policy, failed, slow = LookupRate(), folder(), folder()
    policy.failed(failed, 100.0)
    policy.listed(slow, listing(b"a"), 101.5)
    for node in (failed, slow):
        assert not any(uses([102.0 + 0.1 * use for use in range(20)], node, policy))
        assert any(uses([102.0 + PAUSE_SECONDS + 0.1 * use for use in range(20)], node, policy))


def test_few_directories_are_counted() -> None:
    policy = LookupRate()
    for _ in range(2000):
        policy.note(folder(), 100.0)
    assert len(policy._uses) == lookup_rate._MAX_USED
