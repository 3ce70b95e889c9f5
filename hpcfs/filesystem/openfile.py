"""Handles: what open(2) gave out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from hpcfs.content.content import Content
from hpcfs.inodes.tree import Node
from hpcfs.model.errors import BadHandle, Stale
from hpcfs.prefetch.readahead import Readahead


class Opened(NamedTuple):
    """What open(2) tells the kernel: whether it may keep the pages and the attributes that it has.

    It believes attributes for a second whatever open(2) found out, so it would cut what is read at
    the old size."""

    handle: int
    keep_pages: bool
    keep_attributes: bool


@dataclass(eq=False)
class OpenFile:
    """A file handle: shares its node's content, reads with a readahead of its own."""

    node: Node
    content: Content
    flags: int
    readahead: Readahead = field(default_factory=Readahead)
    is_unsized: bool = field(init=False)
    """The file had no bytes when it was opened to be read: it may be one of those whose size says
    nothing (/proc). The kernel must ask whatever size it knows (direct I/O)."""

    def __post_init__(self) -> None:
        content = self.content
        reads = not (self.is_writable or content.size or content.is_dirty())
        self.is_unsized = (
            reads
            and content.capabilities.handles
            and not content.namespace.is_empty(content.place.path, content.version)
        )

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def appends(self) -> bool:
        return bool(self.flags & os.O_APPEND)

    def check_writable(self) -> None:
        if not self.is_writable:
            raise BadHandle("the file was opened for reading only")

    async def write(self, offset: int, data: bytes) -> None:
        """Write into the cache file: at `offset`, or at the end if the file was opened for that."""
        if self.appends:
            await self.content.append(data)
        else:
            await self.content.write(offset, data)

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        content = self.content
        if self.is_unsized and not content.size:
            return await content.reader.read_unsized(offset, length)
        plan = self.readahead.observe(offset, length, content.reader.window)
        if plan.wanted or plan.dropped:
            content.reader.demand(offset, length)  # before what only runs ahead
            for start, end in plan.dropped:
                content.reader.cancel_prefetch(start, end)
            for start, end in plan.wanted:
                content.reader.prefetch(start, end)
        try:
            return await content.reader.read(offset, length)
        except Stale:
            if not content.reader.is_unsized:
                raise
            return await content.reader.read_unsized(offset, length)
