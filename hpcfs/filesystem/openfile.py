"""Handles: what open(2) gave out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from hpcfs.content.content import Content
from hpcfs.inodes.tree import Node
from hpcfs.model.errors import Stale
from hpcfs.prefetch.readahead import Readahead


class OpenReply(NamedTuple):
    """The answer to open(2): a handle, and whether the kernel may keep the pages and attributes
    that it has.

    It believes attributes for a second whatever open(2) found out, so it would cut what is read at
    the old size.
    """

    handle: int
    keep_pages: bool
    keep_attributes: bool


@dataclass(eq=False)
class OpenFile:
    """A file handle: shares its node's content, reads with a readahead of its own.

    `flags` are those of open(2). `is_unsized` says that the file had no bytes when it was opened to
    be read, so that it may be one of those whose size says nothing (/proc): the kernel must ask
    whatever size it knows (direct I/O).
    """

    node: Node
    content: Content
    flags: int
    readahead: Readahead = field(default_factory=Readahead)
    is_writable: bool = field(init=False)
    appends: bool = field(init=False)
    is_unsized: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_writable = self.flags & os.O_ACCMODE != os.O_RDONLY
        self.appends = bool(self.flags & os.O_APPEND)
        content = self.content
        reads = not (self.is_writable or content.size or content.is_dirty())
        self.is_unsized = (
            reads
            and content.capabilities.handles
            and not content.namespace.is_empty(content.place.path, content.version)
        )

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """Return up to `length` bytes, fewer only at the end of the file; start what readahead
        wants of what follows.

        Raises Stale, CacheFull and RemoteError.
        """
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
