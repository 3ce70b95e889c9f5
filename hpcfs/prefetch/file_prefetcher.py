"""Fetches small files ahead of a program that reads a directory's files one after another.

prefetch/file_predictor.py says which; here they are fetched into the cache, a bounded number of
bytes at once, and held for the time in which the program should come to them. What it does not come
to is let go, and cancelled if it is still under way. A fetch vouches for the file's version at the
time it was asked for: opening the file within that time asks the remote nothing.

Files go by path: those of a directory that was listed ahead have no node yet.
"""

from __future__ import annotations

import logging
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.content.reader import Reader
from hpcfs.content.shared import RemoteFile, Shared
from hpcfs.content.state import State
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS, Node, Tree, number_of
from hpcfs.model.entries import Entry
from hpcfs.model.errors import FilesystemError, RemoteError
from hpcfs.prefetch.file_predictor import PAUSE_SECONDS, FilePredictor
from hpcfs.site.namespace import Namespace

log = logging.getLogger(__name__)

FETCH_BYTES = 1024 * 1024
"""Bytes of each file; the rest of a larger one is readahead's to fetch."""
MOST_BYTES = 16 * 1024 * 1024
"""Under way at once."""
HOLD_SECONDS = 2.0
NEXT_FILES = 32
"""Files fetched of a directory that the program did not come to yet."""
_FEWEST_FILES = 3
_MOST_FILES = 10_000
"""In directories with more, sorting them would delay the program."""
_MOST_DIRECTORIES = 8
"""Directories that programs read at the same time or read next."""


@dataclass(eq=False)
class Foreseen:
    """A file that may be read next, as it was listed: a shared.Place."""

    ino: int
    path: bytes
    entry: Entry
    validated_at: float
    node: Node | None = None

    @property
    def name(self) -> bytes:
        """Its name in the directory."""
        return self.entry.name


@dataclass(eq=False)
class _Hold:
    """A file that is fetched ahead. `asked` is in the tree's time; `file` is in use by the hold
    until the program takes it."""

    place: Foreseen
    namespace: Namespace
    asked: float
    scope: trio.CancelScope
    fetched: trio.Event = field(default_factory=trio.Event)
    taken: trio.Event = field(default_factory=trio.Event)
    file: CacheFile | None = None
    current: bool = False
    """The remote had this version when it was asked."""


_Key = tuple[Namespace, bytes]


class FilePrefetcher:
    """Fetches the files that programs read next, and holds them until the program comes to them."""

    def __init__(self, tree: Tree, shared: Shared) -> None:
        self._tree = tree
        self._shared = shared
        self._store = shared.store
        self._nursery = shared.nursery
        self._predictors: OrderedDict[_Key, FilePredictor[Foreseen]] = OrderedDict()
        """By directory, most recently read last."""
        self._holds: dict[_Key, _Hold] = {}
        self._bytes = 0
        self._order: int | None = None
        self._order_seen = 0.0

    @property
    def holds(self) -> list[_Hold]:
        """The files that are fetched or held at this moment."""
        return list(self._holds.values())

    # --- what programs do -------------------------------------------------------------------------

    def opened(self, node: Node) -> None:
        """Note that a program opens the file to read it, and fetch those that follow."""
        directory, namespace = node.parent, node.namespace
        if directory is None or namespace is None or not node.is_attached:
            return
        predictor = self._predictors.get((namespace, directory.path))
        if predictor is None or not predictor.knows(node.ino):
            predictor = self._add(namespace, directory.path, partial(_files_of, directory))
        for place in predictor.opened(node.ino):
            self._begin(namespace, place)
        self._predictors.move_to_end((namespace, directory.path))
        if predictor.order is not None:
            self._order, self._order_seen = predictor.order, self._tree.now()

    def listed(self, directory: Node) -> None:
        """Note that a program has read all names of the directory.

        If it was reading the files of another one just before, it goes on with these.
        """
        namespace = directory.namespace
        if namespace is None or not self._goes_on:
            return
        predictor = self._predictors.get((namespace, directory.path))
        if predictor is None:
            files = _files_of(directory)
            if not files:
                return
            predictor = self._add(namespace, directory.path, lambda: files)
        for place in predictor.first():
            self._begin(namespace, place)

    def listed_ahead(
        self, namespace: Namespace, path: bytes, entries: Iterable[Entry], asked: float
    ) -> None:
        """Note the files of a directory that the program will come to next; `asked` is its age."""
        if not self._goes_on or (namespace, path) in self._predictors:
            return
        above = path + b"/" if path else b""
        top = namespace.name.encode() + b"/"
        files = _worth_sorting(
            Foreseen(number_of(top + above + entry.name), above + entry.name, entry, asked)
            for entry in entries
            if stat.S_ISREG(entry.mode)
        )
        if not files:
            return
        for place in self._add(namespace, path, lambda: files).first(NEXT_FILES):
            self._begin(namespace, place)

    @property
    def _goes_on(self) -> bool:
        """Whether a program reads files one after another at this time."""
        return self._order is not None and self._tree.now() - self._order_seen < PAUSE_SECONDS

    def _add(
        self, namespace: Namespace, path: bytes, list_files: Callable[[], list[Foreseen]]
    ) -> FilePredictor[Foreseen]:
        predictor = FilePredictor(
            list_files, self._order if self._goes_on else None, self._tree.now
        )
        self._predictors[namespace, path] = predictor
        while len(self._predictors) > _MOST_DIRECTORIES:
            self._predictors.popitem(last=False)
        return predictor

    # --- what was fetched -------------------------------------------------------------------------

    async def is_current(self, node: Node) -> bool:
        """Whether the remote was asked for the file a moment ago and had the version of `node`.

        Waits for the answer where it is on its way.
        """
        hold = self._find(node)
        if hold is None:
            return False
        await hold.fetched.wait()
        same = hold.place.entry.version == node.entry.version
        return hold.current and same and self._tree.now() - hold.asked < ATTRIBUTE_SECONDS

    async def take(self, node: Node) -> CacheFile | None:
        """Return the cache file with what was fetched ahead, in use by the caller from now on."""
        hold = self._find(node)
        if hold is None:
            return None
        await hold.fetched.wait()
        hold.taken.set()
        file, entry = hold.file, node.entry
        if file is None or not file.indexed or file.key != node.path:
            return None
        if (file.version, file.size) != (entry.version, entry.size):
            return None
        hold.file = None
        return file

    def _find(self, node: Node) -> _Hold | None:
        return self._holds.get((node.namespace, node.path)) if node.namespace else None

    # --- fetching ---------------------------------------------------------------------------------

    def _begin(self, namespace: Namespace, place: Foreseen) -> None:
        node, key = place.node, (namespace, place.path)
        wanted = min(place.entry.size, FETCH_BYTES)
        is_open = self._store.is_open(namespace.origin, place.path)
        if key in self._holds or is_open or (node and not node.is_attached):
            return
        if self._bytes + wanted > MOST_BYTES or not self._store.may_prefetch():
            return
        scope = trio.CancelScope(deadline=trio.current_time() + HOLD_SECONDS)
        hold = self._holds[key] = _Hold(place, namespace, self._tree.now(), scope)
        self._nursery.start_soon(self._run, hold, wanted)

    async def _run(self, hold: _Hold, wanted: int) -> None:
        self._bytes += wanted
        try:
            with hold.scope:
                try:
                    await self._fetch(hold)
                finally:
                    self._bytes -= wanted
                    hold.fetched.set()
                if hold.current:
                    await hold.taken.wait()
        except (RemoteError, FilesystemError, OSError) as error:
            log.debug("%r could not be fetched ahead: %s", hold.place.path, error)
        finally:
            del self._holds[hold.namespace, hold.place.path]
            if hold.file is not None:
                self._store.release(hold.file)
                hold.file = None

    async def _fetch(self, hold: _Hold) -> None:
        place, namespace = hold.place, hold.namespace
        capabilities = await namespace.capabilities()
        entry = place.entry
        hold.file = await self._store.acquire(
            namespace.origin, place.path, entry.version, entry.size
        )
        remote = RemoteFile(place, namespace, capabilities)
        reader = Reader(remote, hold.file, State(), self._shared)
        try:
            hold.current = await reader.fetch_first(FETCH_BYTES)
        finally:
            with trio.CancelScope(shield=True):  # only then nothing is written to it any more
                await reader.fetcher.wait_idle()
        self._tell(hold)

    def _tell(self, hold: _Hold) -> None:
        """Tell the node, if the file has one, that it is as the fetch saw it, or has changed."""
        node = hold.place.node
        if node is None or node.entry.version != hold.place.entry.version or node.content:
            return
        if hold.current:
            node.validated_at = max(node.validated_at, hold.asked)
            node.named = max(node.named, hold.asked)
        else:
            self._tree.expire(node)


def _files_of(directory: Node) -> list[Foreseen]:
    """Return the regular files in the order listed."""
    children = directory.children or {}
    if len(children) > _MOST_FILES:
        return []
    above = directory.path + b"/" if directory.path else b""
    return _worth_sorting(
        Foreseen(child.ino, above + name, child.entry, child.validated_at, child)
        for name, child in children.items()
        if child.is_regular
    )


def _worth_sorting(files: Iterable[Foreseen]) -> list[Foreseen]:
    """Return the files, or none where they are too few for a pattern or too many to be sorted."""
    found = list(files)
    return found if _FEWEST_FILES <= len(found) <= _MOST_FILES else []
