"""Inodes, names and attributes: what the kernel was told and may ask about again.

The kernel decides how long a node lives: it holds lookups and forgets them. A node that is gone
from its directory (removed, or replaced by another version of the file) lives on namelessly while
it is open. Nothing here awaits.

A file whose hard links were made here is one node with several names, as long as the remote shows
one version under all of them. Links made elsewhere are files of their own: SFTP tells no inodes.

Inode numbers come from the path, so that programs that remember them (git's index) find the same
ones in the next mount. A file that was replaced on the remote while it is open here becomes
another node: then two versions never share a node, nor the kernel's pages of one (invariant 1).
"""

from __future__ import annotations

import stat
import time
from collections.abc import Callable, Iterator
from hashlib import blake2b

from msgspec import structs

from hpcfs.content.content import Content
from hpcfs.model import paths
from hpcfs.model.entries import Entry
from hpcfs.model.errors import NotADirectory, Stale
from hpcfs.site.namespace import Namespace

ROOT_INO = 1
ATTRIBUTE_SECONDS = 1.0
"""How long attributes and names are believed without asking the remote, here and in the kernel."""


NameWatcher = Callable[["Node", bytes, bool], None]
"""(directory, name, whether what is below that name may be another too): the mount changed it, so
that older answers of the remote don't speak for it."""
ForgottenWatcher = Callable[["Node", bytes, Entry], None]
"""(directory, name, entry): the kernel forgets a name that is still there."""


class Node:
    """One inode: its names, its attributes, and the content while it is open.

    `entry` is what the mount shows; for a file being written it is ahead of the remote.
    `validated_at` is when the remote was asked for it (or when it changed here), in the clock's
    seconds: an answer to an older question must not overwrite it. `named` is when it was asked for
    the name: an open file may be asked for by itself, and another one have its name.
    """

    __slots__ = (
        "changed_here",
        "changed_ns",
        "children",
        "content",
        "entry",
        "extra_links",
        "ino",
        "kernel_is_behind",
        "lookups",
        "name",
        "named",
        "namespace",
        "pages_version",
        "parent",
        "removals",
        "validated_at",
    )

    def __init__(
        self, ino: int, parent: Node | None, name: bytes, namespace: Namespace | None, entry: Entry
    ) -> None:
        self.ino = ino
        self.parent = parent
        self.name = name
        self.namespace = namespace
        self.entry = entry
        self.validated_at = 0.0
        self.named = 0.0
        self.lookups = 0
        self.kernel_is_behind = False
        """The remote's answer is newer than the attributes that the kernel was given."""
        self.changed_here = False
        """Its attributes were changed through the mount: listings may not know that yet."""
        self.changed_ns = 0
        """When attributes or names were last changed here (ctime), 0 if they were not."""
        self.extra_links: list[tuple[Node, bytes]] = []
        """Further names (directory, name), made by link(2) here."""
        self.children: dict[bytes, Node] | None = None
        self.content: Content | None = None
        self.pages_version: bytes | None = None
        """The version that the kernel's page cache may hold."""
        self.removals: dict[bytes, int] | None = None
        """While the directory is being read: names removed here, and when (Tree.clock)."""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.entry.mode)

    @property
    def is_regular(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.entry.mode)

    @property
    def is_link(self) -> bool:
        """Whether it is a symbolic link."""
        return stat.S_ISLNK(self.entry.mode)

    @property
    def is_namespace_root(self) -> bool:
        """Whether it is the top directory of a namespace."""
        return self.namespace is not None and (self.parent is None or self.parent.namespace is None)

    @property
    def is_ahead(self) -> bool:
        """Whether the mount knows better than the remote: the file is being written, or was removed
        here while it is open."""
        return self.content is not None and self.content.is_ahead

    @property
    def is_attached(self) -> bool:
        """Whether the node still has its name."""
        if self.parent is None:
            return self.ino == ROOT_INO
        return self.parent.children is not None and self.parent.children.get(self.name) is self

    @property
    def links(self) -> int:
        """Number of names that are known here; SFTP tells nothing of others."""
        if self.parent is None:
            return 1
        return 1 + len(self.extra_links) if self.is_attached else 0

    @property
    def names(self) -> list[tuple[Node, bytes]]:
        """(directory, name) of all links that are known; of a nameless node, the last one."""
        return [*([(self.parent, self.name)] if self.parent else []), *self.extra_links]

    @property
    def path(self) -> bytes:
        """Path below the namespace's root, of one name if there are several; of a nameless node,
        the last one that it had."""
        parts = []
        node = self
        while not node.is_namespace_root and node.parent is not None:
            parts.append(node.name)
            node = node.parent
        return b"/".join(reversed(parts))

    def below(self) -> Iterator[Node]:
        """Yield the node and all known nodes under it."""
        yield self
        for child in list((self.children or {}).values()):
            yield from child.below()


def number_of(path: bytes) -> int:
    """Return the inode number of a path with its namespace before it, unless that is taken."""
    return int.from_bytes(blake2b(path, digest_size=8).digest(), "big") >> 1


def join(parent: Node, name: bytes) -> bytes:
    """Return the path of a name in this directory."""
    return paths.join(parent.path, name)


def directory_entry(name: bytes, mode: int, uid: int, gid: int, mtime_ns: int) -> Entry:
    """Return the entry of a directory that no remote described."""
    return Entry(name, stat.S_IFDIR | mode, 0, mtime_ns, mtime_ns, uid, gid)


class Tree:
    """The nodes by inode number, and below each other by name.

    `now` is a monotonic clock in seconds.
    """

    def __init__(self, root: Node, now: Callable[[], float] = time.monotonic) -> None:
        self.root = root
        self.now = now
        self.clock = 0
        """Counts removals; see Node.removals."""
        self.moves = 0
        """Counts renames of directories: paths may mean others since."""
        self._watchers: list[NameWatcher] = []
        self._forgotten_watchers: list[ForgottenWatcher] = []
        self._nodes: dict[int, Node] = {root.ino: root}
        self._prefix: tuple[Node | None, bytes] = (None, b"")
        """(directory, prefix with which the names in it are hashed)"""

    def __len__(self) -> int:
        return len(self._nodes)

    def watch_names(self, watcher: NameWatcher) -> None:
        """Call `watcher` for each name that the mount changes, or stops to know better than the
        remote.

        A node that was changed here and still exists needs none: it knows when that was.
        """
        self._watchers.append(watcher)

    def watch_forgotten(self, watcher: ForgottenWatcher) -> None:
        """Call `watcher` for each name whose node is dropped though the name is there."""
        self._forgotten_watchers.append(watcher)

    def _tell(self, parent: Node, name: bytes, *, below: bool) -> None:
        for watcher in self._watchers:
            watcher(parent, name, below)

    def find(self, ino: int) -> Node | None:
        """Return the node of an inode number; None if it was forgotten."""
        return self._nodes.get(ino)

    def get(self, ino: int) -> Node:
        """Return the node of an inode number. Raises Stale if it was forgotten."""
        node = self._nodes.get(ino)
        if node is None:
            raise Stale(f"the kernel asked for inode {ino}, which was forgotten")
        return node

    def directory(self, ino: int) -> Node:
        """Return the node of a directory. Raises NotADirectory, and Stale like `get`."""
        node = self.get(ino)
        if not node.is_directory:
            raise NotADirectory("a directory was needed")
        return node

    def child(self, parent: Node, name: bytes) -> Node | None:
        """Return the node of this name in a directory, if there is one."""
        return None if parent.children is None else parent.children.get(name)

    def is_fresh(self, node: Node, seconds: float = ATTRIBUTE_SECONDS) -> bool:
        """Whether the attributes were asked for, or changed here, in the last `seconds`."""
        return self.now() - node.validated_at < seconds

    def is_named(self, node: Node, seconds: float = ATTRIBUTE_SECONDS) -> bool:
        """Whether its name was known to be that file's in the last `seconds`."""
        return self.now() - node.named < seconds

    def add(
        self,
        parent: Node,
        name: bytes,
        entry: Entry,
        asked: float,
        namespace: Namespace | None = None,
    ) -> Node:
        """Add a node for a name that has none. `asked` is `now()` before the remote was asked."""
        ino = self._new_ino(parent, name, namespace)
        node = Node(ino, parent, name, namespace or parent.namespace, entry)
        node.validated_at = node.named = asked
        self._give_name(node, parent, name)
        self._nodes[node.ino] = node
        return node

    def _new_ino(self, parent: Node, name: bytes, namespace: Namespace | None) -> int:
        if namespace is not None:
            ino = number_of(namespace.name.encode())
        else:
            ino = number_of(self._prefix_of(parent) + name)
        while ino <= ROOT_INO or ino in self._nodes:
            ino += 1
        return ino

    def _prefix_of(self, directory: Node) -> bytes:
        """A listing makes many nodes in one directory: its path is joined once."""
        if self._prefix[0] is not directory:
            top = directory.namespace.name.encode() if directory.namespace else b""
            self._prefix = directory, paths.join(top, directory.path) + b"/"
        return self._prefix[1]

    def update(self, node: Node, entry: Entry, asked: float) -> None:
        """Take over what the remote said of the node's name when asked at `asked`, unless something
        newer is known. Another version may be another file than that of the node's other names."""
        node.named = max(node.named, asked)
        self.update_open(node, entry, asked)

    def update_open(self, node: Node, entry: Entry, asked: float) -> None:
        """Take over what the remote said of the open file, whatever has its name now."""
        if asked >= node.validated_at:
            if node.extra_links and entry.version != node.entry.version:
                for other in list(node.extra_links):
                    self.note_gone(*other)
            self.note_news(node, entry)
            node.entry = entry
            node.validated_at = asked

    def note_news(self, node: Node, entry: Entry) -> None:
        """Note that the kernel is behind if the remote has other attributes.

        What the kernel does by itself it knows: its own writes and truncations.
        """
        known = node.entry
        if (entry.size, entry.mtime_ns) != (known.size, known.mtime_ns):
            node.kernel_is_behind = True

    def set_local(self, node: Node, entry: Entry) -> None:
        """Set the entry to what it is now through what was done here."""
        node.entry = entry
        node.validated_at = node.named = self.now()
        node.changed_here = True

    def touch(self, directory: Node) -> None:
        """Set a directory's time: an entry came, went or was renamed here, unknown to the
        remote."""
        if directory.namespace and not directory.namespace.dates_directories:
            return
        self.set_local(directory, structs.replace(directory.entry, mtime_ns=time.time_ns()))

    def expire(self, node: Node) -> None:
        """Ask the remote before believing the attributes again; answers under way don't count."""
        node.validated_at = node.named = self.now() - ATTRIBUTE_SECONDS
        self.note_attributes(node)

    def doubt(self, parent: Node, name: bytes) -> None:
        """Believe nothing of this name: the remote may have something else under it by now."""
        node = self.child(parent, name)
        if node is not None:
            self.expire(node)
        self.expire(parent)
        self.note_made(parent, name)

    def note_attributes(self, node: Node) -> None:
        """Tell the watchers that older listings don't know the node's attributes any more."""
        for parent, name in node.names:
            self._tell(parent, name, below=False)

    def note_changed(self, node: Node) -> None:
        """Note that attributes or names of the file changed now (ctime)."""
        node.changed_ns = time.time_ns()

    def detach(self, node: Node) -> None:
        """Take all its names from the node, and what was below it with them."""
        for parent, name in node.names:
            self._take_name(node, parent, name)
            self._note_removal(parent, name)
        self.drop_if_unused(node)

    def _take_name(self, node: Node, parent: Node, name: bytes) -> None:
        """Take one name from the node, which goes by another one from now on if it has several."""
        if parent.children is not None and parent.children.get(name) is node:
            del parent.children[name]
        if (parent, name) in node.extra_links:
            node.extra_links.remove((parent, name))
        elif node.extra_links:
            node.parent, node.name = node.extra_links.pop(0)

    def add_name(self, node: Node, parent: Node, name: bytes) -> None:
        """Add a hard link that was made here; nothing has that name."""
        node.extra_links.append((parent, name))
        self._give_name(node, parent, name)

    def _give_name(self, node: Node, parent: Node, name: bytes) -> None:
        if parent.children is None:
            parent.children = {}
        parent.children[name] = node
        if parent.removals is not None:
            parent.removals.pop(name, None)

    def _note_removal(self, parent: Node, name: bytes) -> None:
        self.clock += 1
        if parent.removals is not None:
            parent.removals[name] = self.clock
        self._tell(parent, name, below=True)

    def note_made(self, parent: Node, name: bytes) -> None:
        """Tell the watchers that something else may have this name from now on."""
        self._tell(parent, name, below=False)

    def note_gone(self, parent: Node, name: bytes) -> None:
        """Remove a name that is gone; it may have had no node. A node's other names stay."""
        node = self.child(parent, name)
        if node:
            self._take_name(node, parent, name)
        self._note_removal(parent, name)
        if node:
            self.drop_if_unused(node)

    def move(self, node: Node, old: tuple[Node, bytes], parent: Node, name: bytes) -> None:
        """Rename what was `old` (directory, name); whatever had the new name loses it."""
        if node.is_directory:
            self.moves += 1
            self._prefix = (None, b"")
        self.note_gone(parent, name)
        self._note_removal(*old)
        if old in node.extra_links:
            node.extra_links[node.extra_links.index(old)] = (parent, name)
        else:
            node.parent, node.name = parent, name
        if old[0].children is not None and old[0].children.get(old[1]) is node:
            del old[0].children[old[1]]
        self._give_name(node, parent, name)

    def count_lookup(self, node: Node) -> None:
        """Count one lookup: the kernel was given this node."""
        node.lookups += 1

    def forget(self, ino: int, lookups: int) -> None:
        """Take back so many of the lookups that the kernel was given."""
        node = self._nodes.get(ino)
        if node is not None:
            node.lookups -= lookups
            self.drop_if_unused(node)

    def drop_if_unused(self, node: Node) -> None:
        """Drop the node, and what only led to it, if nothing uses it any more."""
        todo = [node]
        while todo:
            node = todo.pop()
            if (
                node.lookups > 0
                or node.content is not None
                or node.children
                or node.is_namespace_root
                or node.ino == ROOT_INO
            ):
                continue
            self._nodes.pop(node.ino, None)
            for parent, name in node.names:
                if parent.children is not None and parent.children.get(name) is node:
                    del parent.children[name]
                    if node.changed_here:
                        self._tell(parent, name, below=False)
                    for watcher in self._forgotten_watchers:
                        watcher(parent, name, node.entry)
                    todo.append(parent)
