"""Which directories a program that walks a tree will read next. A policy: no I/O, no clock.

find, du, ls -R, cp -r, rsync and grep -r read a directory, then each of its subdirectories with all
below it. So what comes next is known: the subdirectories of what was read last, then what follows
it in its parent, and so on up to where the walk began. Only their order differs: as listed (find,
du), by name (ls, rsync), by inode number (cp, tar). Whichever agreed with the last steps counts.

How many are listed ahead doubles with each that is read, until there are as many as the program
reads while one is listed; halves when one is read that was not foreseen or when some went unused;
and is none when a program pauses.

Directories are named by their path, with the namespace before it.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice

from hpcfs.model import paths

FEWEST, MOST = 2, 24
"""How many are listed ahead at once. At 20 ms a listing takes three round trips, and 24 at once
make some 400 directories per second: more than a server and the two processes here can list."""
MOST_HELD = 2 * MOST
"""With those that were listed before it was seen that others, below, come first."""
QUIET_SECONDS = 1.0
"""A program that read nothing for so long does not walk."""
_WALKS = 4
_MAX_NAMES = 20_000
"""Subdirectories that one walk remembers."""

Number = Callable[[bytes], int]
"""The inode number of a path."""


class Found(enum.Enum):
    """How much was there of a listing when a program asked for it."""

    NOTHING = enum.auto()
    UNDER_WAY = enum.auto()
    READY = enum.auto()


class Order(enum.IntEnum):  # hashed without Python
    """In which order a program reads the subdirectories of one directory."""

    LISTED = enum.auto()
    NAME = enum.auto()
    NUMBER = enum.auto()


class _Folder:
    """A directory's subdirectories, and which of them was read last."""

    def __init__(self, path: bytes, names: Sequence[bytes], number: Number) -> None:
        self.count = len(names)
        self.last: bytes | None = None
        self._read: set[bytes] = set()
        self._path = path
        self._number = number
        self._orders: dict[Order, list[bytes]] = {Order.LISTED: list(names)}
        self._ranks: dict[Order, dict[bytes, int]] = {}

    def __contains__(self, name: bytes) -> bool:
        return name in self._rank(Order.LISTED)

    def _names(self, order: Order) -> list[bytes]:
        if order not in self._orders:
            listed = self._orders[Order.LISTED]
            if order is Order.NAME:
                self._orders[order] = sorted(listed)
            else:
                self._orders[order] = sorted(
                    listed, key=lambda n: self._number(paths.join(self._path, n))
                )
        return self._orders[order]

    def _rank(self, order: Order) -> dict[bytes, int]:
        if order not in self._ranks:
            self._ranks[order] = {name: rank for rank, name in enumerate(self._names(order))}
        return self._ranks[order]

    def _next(self, order: Order) -> int:
        return 0 if self.last is None else self._rank(order)[self.last] + 1

    def foresees(self, name: bytes, order: Order) -> bool:
        return self._rank(order)[name] == self._next(order)

    def reads(self, name: bytes) -> None:
        self.last = name
        self._read.add(name)

    def following(self, order: Order) -> Iterator[bytes]:
        """Yield the names that come next in this order and were not read yet."""
        names = islice(self._names(order), self._next(order), None)
        return (name for name in names if name not in self._read)


class WalkPredictor:
    """Predicts one walk, from `root` down. `window` is how many directories to list ahead."""

    def __init__(self, root: bytes, number: Number, now: float) -> None:
        self.root = root
        self.window = 0
        self.order = Order.LISTED
        self._number = number
        self.waiting = 0
        """Listings that the program waits for."""
        self._active = now
        self._took: float | None = None
        self._thinks: float | None = None
        """How long a listing takes, and the program from one to the next; seconds, smoothed."""
        self._last = root
        self._folders: dict[bytes, _Folder] = {}

    def is_quiet(self, now: float) -> bool:
        """Whether the program has read nothing for QUIET_SECONDS."""
        return not self.waiting and now - self._active > QUIET_SECONDS

    def knows(self, path: bytes) -> bool:
        """Whether the walk began here, or has met this directory in its parent."""
        folder = self._folders.get(paths.parent(path))
        return path == self.root or (folder is not None and paths.name(path) in folder)

    def opened(self, path: bytes, found: Found, held: Collection[bytes], now: float) -> None:
        """Note that a program reads this directory. `held` are those that are listed ahead."""
        pauses = self.is_quiet(now)
        if not self.waiting:
            self._thinks = _smoothed(self._thinks, now - self._active)
        self._active = now
        worth = self._step(path) if path != self.root else 0
        self._last = path
        if pauses:
            self.window = 0
        elif found is Found.UNDER_WAY or (found is Found.READY and self._is_too_small()):
            self.window = min(MOST, max(FEWEST, 2 * self.window))
        elif found is Found.READY:
            self.window = max(FEWEST, self.window)
        elif worth:
            self.window = max(worth, self.window)
        else:
            self.window //= 2
        if found is Found.NOTHING:
            self._folders.pop(path, None)
        self._forget_all_but(path, held)

    def _is_too_small(self) -> bool:
        """Whether the program will have to wait for the next ones at this rate."""
        return self.window * (self._thinks or 0.0) < (self._took or 0.0)

    def _step(self, path: bytes) -> int:
        """Return how many to list ahead because this directory was to be expected, perhaps in
        another order than the last steps were in."""
        folder, name = self._folders[paths.parent(path)], paths.name(path)
        orders = [self.order, *Order]
        agreeing = next((order for order in orders if folder.foresees(name, order)), None)
        is_first = folder.last is None
        folder.reads(name)
        if agreeing is None:
            return 0
        self.order = agreeing
        return 1 if is_first else FEWEST

    def _forget_all_but(self, path: bytes, held: Collection[bytes]) -> None:
        """Forget what the program has left behind: it does not come again."""
        self._folders = {
            known: folder
            for known, folder in self._folders.items()
            if paths.is_below(path, known) or known in held
        }

    def listed(self, path: bytes, subdirectories: Sequence[bytes], took: float) -> None:
        """Note the subdirectories of a directory, which took `took` seconds to list."""
        self._took = _smoothed(self._took, took)
        names = sum(folder.count for folder in self._folders.values())
        if names + len(subdirectories) <= _MAX_NAMES:
            self._folders[path] = _Folder(path, subdirectories, self._number)

    def answered(self, now: float) -> None:
        """Note that the program waits no more."""
        self.waiting -= 1
        self._active = now

    def wasted(self) -> None:
        """Look less far ahead: what was listed ahead was not used in time."""
        self.window //= 2

    def wanted(self) -> list[bytes]:
        """Return what to list ahead, or to keep if it is; the next one first."""
        return list(islice(self._upcoming(), self.window))

    def _upcoming(self) -> Iterator[bytes]:
        path = self._last
        yield from self._below(path)
        while path != self.root:
            path = paths.parent(path)
            yield from self._below(path)

    def _below(self, path: bytes) -> Iterator[bytes]:
        """Depth first. This runs for each directory that a program reads: without recursion, it
        costs as much in a deep tree as in a flat one."""
        folder = self._folders.get(path)
        stack = [] if folder is None else [(path, folder.following(self.order))]
        while stack:
            above, names = stack[-1]
            name = next(names, None)
            if name is None:
                stack.pop()
                continue
            inside = paths.join(above, name)
            yield inside
            if (folder := self._folders.get(inside)) is not None:
                stack.append((inside, folder.following(self.order)))


class WalkPredictors:
    """Keeps the walks that go on, by where they began; the longest unused one is forgotten."""

    def __init__(self, number: Number) -> None:
        self._number = number
        self._walks: OrderedDict[bytes, WalkPredictor] = OrderedDict()

    def opened(
        self, path: bytes, found: Found, held: Collection[bytes], now: float
    ) -> WalkPredictor:
        """Return the walk that this directory belongs to, perhaps a new one."""
        walk = next((walk for walk in reversed(self._walks.values()) if walk.knows(path)), None)
        if walk is None:
            walk = self._walks[path] = WalkPredictor(path, self._number, now)
            if len(self._walks) > _WALKS:
                self._walks.popitem(last=False)
        else:
            self._walks.move_to_end(walk.root)
            walk.opened(path, found, held, now)
        walk.waiting += 1
        return walk


def _smoothed(before: float | None, now: float) -> float:
    return now if before is None else before + (now - before) / 4
