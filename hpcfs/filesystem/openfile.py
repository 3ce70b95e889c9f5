"""Handles: what open(2) gave out."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import NamedTuple

from hpcfs.cache.readahead import Readahead
from hpcfs.filesystem.content import Content
from hpcfs.filesystem.errors import BadHandle
from hpcfs.filesystem.tree import Node


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

    @property
    def is_writable(self) -> bool:
        return self.flags & os.O_ACCMODE != os.O_RDONLY

    @property
    def appends(self) -> bool:
        return bool(self.flags & os.O_APPEND)

    def check_writable(self) -> None:
        if not self.is_writable:
            raise BadHandle("the file was opened for reading only")

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        content = self.content
        plan = self.readahead.observe(offset, length, content.window)
        if plan.wanted or plan.dropped:
            content.demand(offset, length)  # before what only runs ahead
            for start, end in plan.dropped:
                content.cancel_prefetch(start, end)
            for start, end in plan.wanted:
                content.prefetch(start, end)
        return await content.read(offset, length)
