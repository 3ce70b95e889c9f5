"""Symbolic links of a remote, and where they may lead the programs of this machine.

The kernel follows what readlink answers, so a link on a server could make a local program read or
write any file of this machine. In the mode "contain" what a server tells leads to places below the
namespace's root only, and the answer proves it by its form: as many ".." at its beginning as there
are directories above the link in the namespace, and none after a name, where it would be taken from
wherever a further link has led. An absolute target that means a path below the root, on the server
or in this mount, becomes a relative one. All else is refused, as sshfs does since CVE-2026-47187.

A link that was made here leads where its maker wanted for as long as the mount lasts and the server
shows the very same target: programs that copy links look at what they made.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable

from hpcfs.filesystem.lookup import Lookup
from hpcfs.inodes.tree import Node, Tree
from hpcfs.model import paths
from hpcfs.model.errors import LeadsOut, NotADirectory, NotFound, RemoteError
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace

MAX_LINKS = 40
"""That one target leads through, as Linux allows (MAXSYMLINKS in linux/namei.h)."""
_Targets = OrderedDict[tuple[str, bytes], bytes]
"""By (namespace, path)."""
REMEMBERED = 10_000
"""Symlinks made here, and targets read for when the namespace is away."""


class Symlinks:
    """Decides where symbolic links lead; `mountpoint` is the mount's own absolute path."""

    def __init__(self, tree: Tree, lookup: Lookup, mountpoint: bytes | None) -> None:
        self._tree = tree
        self._lookup = lookup
        self._mountpoint = mountpoint
        self._made: _Targets = OrderedDict()
        self._read_last: _Targets = OrderedDict()

    def made(self, node: Node, target: bytes) -> None:
        """Note that a link was made here with this target."""
        for targets in (self._made, self._read_last):
            _note(targets, _key(node), target)

    def moved(self, namespace: Namespace, old: bytes, new: bytes) -> None:
        """Note that a name was renamed here, and all below it."""
        for targets in (self._made, self._read_last):
            for name, path in list(targets):
                if name == namespace.name and paths.is_below(path, old):
                    _note(targets, (name, new + path[len(old) :]), targets.pop((name, path)))

    async def target(self, node: Node) -> bytes:
        """Return the target that readlink(2) answers. Raises LeadsOut, RemoteError."""
        assert node.namespace
        target = await self._read(node)
        if node.namespace.symlinks == "follow" or self._made.get(_key(node)) == target:
            return target
        return await self._contained(node, target)

    async def _read(self, node: Node) -> bytes:
        """Return the target as the remote has it, or had it if it is away."""
        namespace, key = node.namespace, _key(node)
        assert namespace
        try:
            target = await namespace.call(m.ReadLink(node.path), bytes)
        except RemoteError as error:
            known = self._read_last.get(key)
            if known is None or not namespace.absence_explains(error):
                raise
            return known
        _note(self._read_last, key, target)
        return target

    async def _contained(self, node: Node, target: bytes) -> bytes:
        """Return a target that means the same place, in the form that leads nowhere else."""
        assert node.parent
        parts = _parts(target)
        if target.startswith(b"/"):
            parts = await self._below_root(node, parts)
            start = _root_of(node)
        else:
            ups = _leading_ups(parts)
            if b".." not in parts[ups:]:
                if ups and ups > _depth(node):
                    raise _leads_out(node)
                return target
            start = node.parent
        found = await self._walked(node, start, deque(parts))
        place = b"/".join([*[b".."] * _depth(node), *found]) or b"."  # no await from here on
        return place + b"/" if target.endswith(b"/") and found else place

    async def _below_root(self, node: Node, parts: list[bytes]) -> list[bytes]:
        """Return the part of an absolute path below the namespace's root."""
        namespace = node.namespace
        assert namespace
        roots = [*(await namespace.capabilities()).roots]
        if self._mountpoint is not None:
            root = _root_of(node)
            roots.append(self._mountpoint + (b"/" + root.name if root.parent else b""))
        for root_parts in map(_parts, roots):
            if parts[: len(root_parts)] == root_parts:
                return parts[len(root_parts) :]
        raise _leads_out(node)

    async def _walked(self, link: Node, at: Node, todo: deque[bytes]) -> list[bytes]:
        """The names from the namespace's root to the place that the path means, without "..".

        Names before a ".." are looked at, as a link among them leads elsewhere; what is missing
        counts as a directory: nobody gets anywhere through it.
        """
        beyond: list[bytes] = []
        """Below `at`, as it is written."""
        followed = 0
        seen: list[Node] = []
        try:
            while todo:
                part = todo.popleft()
                if part == b"..":
                    if beyond:
                        beyond.pop()
                    elif at.is_namespace_root or at.parent is None:
                        raise _leads_out(link)
                    else:
                        at = at.parent
                    continue
                child = await self._child(at, part, seen) if b".." in todo and not beyond else None
                if child is not None and child.is_directory:
                    at = child
                elif child is not None and child.is_link:
                    followed += 1
                    if followed > MAX_LINKS:
                        raise _leads_out(link)
                    target = await self._read(child)
                    inner = _parts(target)
                    if target.startswith(b"/"):
                        at, inner = _root_of(at), await self._below_root(link, inner)
                    todo.extendleft(reversed(inner))
                else:
                    beyond.append(part)
            return [*_parts(at.path), *beyond]
        finally:
            for node in seen:
                self._tree.drop_if_unused(node)

    async def _child(self, directory: Node, name: bytes, seen: list[Node]) -> Node | None:
        try:
            child = await self._lookup.find(directory.ino, name)
        except (NotFound, NotADirectory):
            return None
        seen.append(child)
        return child


def _note(targets: _Targets, key: tuple[str, bytes], target: bytes) -> None:
    targets[key] = target
    targets.move_to_end(key)
    if len(targets) > REMEMBERED:
        targets.popitem(last=False)


def _key(node: Node) -> tuple[str, bytes]:
    assert node.namespace
    return node.namespace.name, node.path


def _depth(node: Node) -> int:
    """Return the number of directories between a link and its namespace's root.

    A link with names in several directories has none: from each of them ".." leads elsewhere.
    """
    parent = node.parent
    if parent is None or any(other is not parent for other, _ in node.extra_links):
        raise _leads_out(node)
    return len(_parts(parent.path))


def _leads_out(node: Node) -> LeadsOut:
    return LeadsOut(f"{_shown(node)} leads out of the namespace")


def _root_of(node: Node) -> Node:
    """Return the root of its namespace."""
    while not node.is_namespace_root and node.parent is not None:
        node = node.parent
    return node


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _leading_ups(parts: Iterable[bytes]) -> int:
    count = 0
    for part in parts:
        if part != b"..":
            break
        count += 1
    return count


def _shown(node: Node) -> str:
    return f"the symbolic link {node.path.decode(errors='backslashreplace')!r}"
