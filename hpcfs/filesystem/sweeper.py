"""Fetches small files ahead of a program that reads a directory's files one after another.

filesystem/sweep.py says which; here they are fetched, a bounded number of bytes at once, and held
for the time in which the program should come to them. What it does not come to is let go, and
cancelled if it is still under way. A fetch vouches for the file's version at the time it was asked
for: opening the file within that time asks the remote nothing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import trio

from hpcfs.filesystem.content import Content
from hpcfs.filesystem.errors import FilesystemError
from hpcfs.filesystem.sweep import PAUSE_SECONDS, Sweep
from hpcfs.filesystem.tree import ATTRIBUTE_SECONDS, Node, Tree
from hpcfs.transfer import messages as m

log = logging.getLogger(__name__)

FETCH_BYTES = 1024 * 1024
"""Of each file; the rest of a larger one is readahead's to fetch."""
MOST_BYTES = 16 * 1024 * 1024
"""Under way at once."""
HOLD_SECONDS = 2.0
_FEWEST_FILES = 3
_MOST_FILES = 10_000
"""In directories with more, sorting them would delay the program."""
_MOST_SWEEPS = 4
"""Directories that programs read at the same time."""

Holding = Callable[[Node], AbstractAsyncContextManager[Content]]
"""Keeps a file's content while it is fetched and held (Files.holding)."""


@dataclass(eq=False)
class _Hold:
    """A file that is fetched ahead. `asked` is in the tree's time."""

    asked: float
    scope: trio.CancelScope
    fetched: trio.Event = field(default_factory=trio.Event)
    opened: trio.Event = field(default_factory=trio.Event)
    current: bool = False
    """The remote had this version when it was asked."""


class Sweeper:
    """`may_prefetch` tells whether the cache has room for what nobody waits for."""

    def __init__(
        self,
        tree: Tree,
        holding: Holding,
        may_prefetch: Callable[[], bool],
        nursery: trio.Nursery,
    ) -> None:
        self._may_prefetch = may_prefetch
        self._tree = tree
        self._holding = holding
        self._nursery = nursery
        self._sweeps: OrderedDict[int, Sweep[Node]] = OrderedDict()
        """By the directory's inode number, most recently read last."""
        self._holds: dict[int, _Hold] = {}
        """By the file's inode number."""
        self._bytes = 0
        self._order: int | None = None
        self._order_seen = 0.0

    @property
    def holds(self) -> list[_Hold]:
        """What is fetched or held at this moment."""
        return list(self._holds.values())

    def opened(self, node: Node) -> None:
        """A program opens the file to read it."""
        if hold := self._holds.get(node.ino):
            hold.opened.set()
        directory = node.parent
        if directory is None or directory.namespace is None or not node.is_attached:
            return
        sweep = self._sweep(directory, node)
        if sweep is None:
            return
        for file in sweep.opened(node):
            self._begin(file)
        if sweep.order is not None:
            self._order, self._order_seen = sweep.order, self._tree.now()

    def listed(self, directory: Node) -> None:
        """A program has read all names of the directory. If it was reading the files of another
        one just before, it goes on with these."""
        if directory.namespace is None or not self._goes_on():
            return
        files = _regular_files(directory)
        if files is not None:
            for file in self._add(directory, files).first():
                self._begin(file)

    def _goes_on(self) -> bool:
        return self._order is not None and self._tree.now() - self._order_seen < PAUSE_SECONDS

    async def is_current(self, node: Node) -> bool:
        """Whether the remote was asked for the file a moment ago and had the version of `node`.

        Waits for the answer where it is on its way.
        """
        hold = self._holds.get(node.ino)
        if hold is None:
            return False
        await hold.fetched.wait()
        return hold.current and self._tree.now() - hold.asked < ATTRIBUTE_SECONDS

    def _sweep(self, directory: Node, file: Node) -> Sweep[Node] | None:
        sweep = self._sweeps.get(directory.ino)
        if sweep is None or not sweep.knows(file):
            files = _regular_files(directory)
            if files is None:
                return None
            sweep = self._add(directory, files)
        self._sweeps.move_to_end(directory.ino)
        return sweep

    def _add(self, directory: Node, files: list[Node]) -> Sweep[Node]:
        sweep = Sweep(files, self._order if self._goes_on() else None, self._tree.now)
        self._sweeps[directory.ino] = sweep
        while len(self._sweeps) > _MOST_SWEEPS:
            self._sweeps.popitem(last=False)
        return sweep

    def _begin(self, node: Node) -> None:
        wanted = min(node.entry.size, FETCH_BYTES)
        if node.ino in self._holds or node.content is not None or not node.is_attached:
            return
        if self._bytes + wanted > MOST_BYTES or not self._may_prefetch():
            return
        scope = trio.CancelScope(deadline=trio.current_time() + HOLD_SECONDS)
        self._holds[node.ino] = hold = _Hold(self._tree.now(), scope)
        self._bytes += wanted
        self._nursery.start_soon(self._run, node, hold, wanted)

    async def _run(self, node: Node, hold: _Hold, wanted: int) -> None:
        try:
            with hold.scope:
                async with self._holding(node) as content:
                    hold.current = await content.fetch_ahead(FETCH_BYTES)
                    hold.fetched.set()
                    if not hold.current:
                        self._tree.expire(node)
                        return
                    self._bytes, wanted = self._bytes - wanted, 0
                    await hold.opened.wait()
                    return
        except (m.RemoteError, FilesystemError, OSError) as error:
            log.debug("%r could not be fetched ahead: %s", node.path, error)
        finally:
            self._bytes -= wanted
            hold.fetched.set()
            if self._holds.get(node.ino) is hold:
                del self._holds[node.ino]


def _regular_files(directory: Node) -> list[Node] | None:
    """As they were listed; None where fetching ahead is not worth it."""
    children = directory.children or {}
    if not _FEWEST_FILES <= len(children) <= _MOST_FILES:
        return None
    return [child for child in children.values() if child.is_regular]
