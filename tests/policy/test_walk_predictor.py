"""The policy of walking ahead, against programs that walk random trees in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import pytest
from hypothesis import example, given, settings, strategies as st

from hpcfs.directories.walk_predictor import (
    MOST,
    MOST_HELD,
    QUIET_SECONDS,
    Found,
    WalkPredictor,
    WalkPredictors,
)

Tree = dict[bytes, "Tree"]
"""Subdirectories by name."""

ROUND_TRIP = 0.06
"""What a listing takes."""


def number(path: bytes) -> int:
    return int.from_bytes(blake2b(path, digest_size=8).digest(), "big")


Order = Callable[[bytes, Tree], list[bytes]]
ORDERS: dict[str, Order] = {
    "find": lambda path, names: list(names),
    "ls": lambda path, names: sorted(names),
    "cp": lambda path, names: sorted(names, key=lambda name: number(path + b"/" + name)),
}


def preorder(path: bytes, tree: Tree, order: Order) -> Iterator[tuple[bytes, Tree]]:
    yield path, tree
    for name in order(path, tree):
        yield from preorder(path + b"/" + name, tree[name], order)


def flat(count: int) -> Tree:
    """In no order that a program would sort them to."""
    return {b"%x" % (number(b"%d" % index) % 10**9): {} for index in range(count)}


@dataclass
class Run:
    """A program reads directories one after the other; what the walk wants is listed ahead."""

    all: dict[bytes, Tree]
    thinking: float = 0.001
    """Seconds that the program takes for each."""
    now: float = 0.0
    ahead: dict[bytes, float] = field(default_factory=dict)
    """When they come."""
    read: list[bytes] = field(default_factory=list)
    listed: int = 0
    walks: WalkPredictors = field(default_factory=lambda: WalkPredictors(number))
    most: int = 0
    in_order: bool = True
    _noted: set[bytes] = field(default_factory=set)
    walk: WalkPredictor = field(init=False)

    def go(self, path: bytes) -> None:
        self._arrive()
        ready = self.ahead.pop(path, None)
        found = Found.NOTHING
        if ready is not None:
            found = Found.READY if ready <= self.now else Found.UNDER_WAY
        walk = self.walks.opened(path, found, self.ahead, self.now)
        self._ask(walk)
        if ready is None:
            self.listed += 1
            ready = self.now + ROUND_TRIP
        self.now = max(self.now, ready)
        self._arrive()
        walk.answered(self.now)
        walk.listed(path, list(self.all[path]), ROUND_TRIP)
        self.read.append(path)
        self.walk = walk
        self._ask(walk)
        self.now += self.thinking

    def _arrive(self) -> None:
        for path, ready in list(self.ahead.items()):
            if ready <= self.now and path not in self._noted:
                self._noted.add(path)
                self.walk.listed(path, list(self.all[path]), ROUND_TRIP)
                self._ask(self.walk)

    def _ask(self, walk: WalkPredictor) -> None:
        wanted = walk.wanted()
        assert len(wanted) == len(set(wanted)) <= MOST
        if self.in_order:
            assert not set(wanted) & set(self.read), "what was read does not come again"
        for path in wanted:
            assert path in self.all
            if path not in self.ahead and len(self.ahead) < MOST_HELD:
                self.ahead[path] = self.now + ROUND_TRIP
                self.listed += 1
        self.most = max(self.most, len(self.ahead))


names = st.binary(min_size=1, max_size=3).map(lambda raw: raw.hex().encode())
trees: st.SearchStrategy[Tree] = st.recursive(
    st.just({}), lambda inside: st.dictionaries(names, inside, max_size=8), max_leaves=60
)
orders = st.sampled_from(sorted(ORDERS))


@pytest.mark.slow
@settings(deadline=None)
@example({b"000000": {b"0000": {}, b"00": {}}, b"00": {}}, "cp")  # by name above, as listed below
@given(trees, orders)
def test_a_walk_reads_each_directory_once_and_lists_none_twice(tree: Tree, program: str) -> None:
    """Looking ahead costs nothing: what was listed is what the program reads, but for the few that
    were foreseen in another program's order at first."""
    run = Run(dict(preorder(b"ns", tree, ORDERS["find"])))
    steps = [path for path, _ in preorder(b"ns", tree, ORDERS[program])]
    for path in steps:
        run.go(path)
    assert run.read == steps
    assert run.listed == len(steps)
    assert not run.ahead


@given(st.integers(50, 300), orders)
@settings(deadline=None, max_examples=30)
def test_a_walk_waits_for_few_round_trips(count: int, program: str) -> None:
    tree = flat(count)
    run = Run(dict(preorder(b"ns", tree, ORDERS["find"])))
    for path, _ in preorder(b"ns", tree, ORDERS[program]):
        run.go(path)
    waited = run.now - (count + 1) * run.thinking
    assert waited < ROUND_TRIP * (10 + count / MOST)


@given(st.integers(2, 40), st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_a_walk_goes_down_before_it_goes_on(wide: int, deep: int) -> None:
    """Directories that are listed ahead show theirs, which come before what follows them."""
    tree: Tree = {name: {b"a": {b"b": {}}} for name in flat(wide)}
    for _ in range(deep):
        tree = {b"x": tree}
    steps = [path for path, _ in preorder(b"ns", tree, ORDERS["find"])]
    run = Run(dict(preorder(b"ns", tree, ORDERS["find"])))
    for path in steps:
        run.go(path)
    assert run.now < ROUND_TRIP * (deep + 12 + len(steps) / 4) + len(steps) * run.thinking


@given(st.integers(2, 100), st.floats(QUIET_SECONDS + 0.01, 100))
@settings(deadline=None)
def test_nothing_is_listed_ahead_of_a_program_that_pauses(count: int, pause: float) -> None:
    tree = flat(count)
    run = Run(dict(preorder(b"ns", tree, ORDERS["find"])), thinking=pause)
    for path, _ in preorder(b"ns", tree, ORDERS["find"]):
        run.go(path)
    assert run.most == 0


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_directories_in_no_order_are_hardly_listed_ahead(seed: int) -> None:
    tree = flat(400)
    run = Run(dict(preorder(b"ns", tree, ORDERS["find"])), in_order=False)
    run.go(b"ns")
    for name in random.Random(seed).sample(sorted(tree), 60):
        run.ahead.clear()  # as ahead.py does with what is not wanted
        run.go(b"ns/" + name)
    assert run.listed - len(run.read) <= 20


def test_unused_listings_make_the_window_smaller() -> None:
    run = Run(dict(preorder(b"ns", flat(100), ORDERS["find"])))
    for path in list(run.all)[:40]:
        run.go(path)
    before = run.walk.window
    assert before >= 8
    run.walk.wasted()
    assert run.walk.window == before // 2


@pytest.mark.slow
def test_an_endless_walk_takes_bounded_memory() -> None:
    """What the program has left behind is forgotten."""
    tree = {name: flat(20) for name in flat(500)}
    run = Run(dict(preorder(b"ns", tree, ORDERS["find"])))
    for path, _ in preorder(b"ns", tree, ORDERS["find"]):
        run.go(path)
        assert len(run.walk._folders) <= 3 + MOST_HELD


def test_four_walks_are_known_at_once() -> None:
    roots = [b"ns/%d" % number for number in range(5)]
    run = Run({root: {} for root in roots})
    for root in roots:
        run.go(root)
    assert list(run.walks._walks) == roots[1:]
