"""Fetches a file into the cache because the user asked for it (`hpcfs cache warm`).

It is read from its beginning to its end like a program would, with the same readahead, but for the
bytes' way into the kernel: so its speed is a reader's, its blocks are verified, and it takes no
more memory than a reader does.
"""

from __future__ import annotations

import os

from hpcfs.cache.maintenance import ReportBytes
from hpcfs.cache.store import Store
from hpcfs.filesystem.filesystem import Filesystem
from hpcfs.inodes.tree import ROOT_INO, Node
from hpcfs.model.errors import CacheFull, NotADirectory, Stale

_READ_BYTES = 1024 * 1024


async def warm(fs: Filesystem, store: Store, path: bytes, tell: ReportBytes) -> int:
    """Fetch what is missing of the file at this path of the mount; returns its size.

    Raises RemoteError and FilesystemError; CacheFull where it would not stay in the cache.
    """
    try:
        return await _warm(fs, store, path, tell)
    except Stale:  # replaced since the walk to it began: as for open(2), once more
        return await _warm(fs, store, path, tell)


async def _warm(fs: Filesystem, store: Store, path: bytes, tell: ReportBytes) -> int:
    nodes: list[Node] = []
    try:
        node = await _walk(fs, path, nodes)
        handle = (await fs.files.open(node, os.O_RDONLY)).handle
        try:
            return await _read(fs, store, handle, tell)
        finally:
            fs.files.release(handle)
    finally:
        for node in nodes:
            fs.tree.forget(node.ino, 1)


async def _walk(fs: Filesystem, path: bytes, nodes: list[Node]) -> Node:
    """The node of this path. All on the way is added to `nodes`, to be forgotten afterwards."""
    node = fs.tree.get(ROOT_INO)
    for name in path.split(b"/"):
        if not node.is_directory:
            raise NotADirectory("a part of the path is no directory")
        node = await fs.lookup.find(node.ino, name)
        fs.tree.count_lookup(node)
        nodes.append(node)
    return node


async def _read(fs: Filesystem, store: Store, handle: int, tell: ReportBytes) -> int:
    content = fs.files.get(handle).content
    content.reader.use_disk()
    done = 0
    if content.size > store.max_bytes:
        raise CacheFull("the file is larger than the cache: raise cache_size")
    while data := await fs.files.read(handle, done, _READ_BYTES):
        done += len(data)
        await tell(done, content.size)
        if not store.may_prefetch():
            raise CacheFull(
                "the cache has no room: its disk is nearly full, or what it holds is pinned or not "
                "uploaded yet"
            )
    return done
