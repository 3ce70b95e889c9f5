"""Extended attributes: getxattr(2), setxattr(2), listxattr(2) and removexattr(2).

Only those of Linux's namespace "user." or of none, and only where the remote keeps them. They come
and go with the other attributes: in every entry, and with the upload of a file that is not on the
remote yet.
"""

from __future__ import annotations

import os

from hpcfs.filesystem.attributes import AttributeChanges
from hpcfs.filesystem.lookup import Lookup
from hpcfs.inodes.permissions import Permissions
from hpcfs.inodes.tree import Node
from hpcfs.model.entries import Attributes
from hpcfs.model.errors import (
    AttributesFull,
    InvalidRequest,
    NoAttribute,
    NotSupported,
    ReadOnly,
)
from hpcfs.model.xattrs import XATTRS_TEXT_BYTES, changed_xattrs, is_kept_xattr, xattrs_text
from hpcfs.site.namespace import Namespace


class ExtendedAttributes:
    """Reads and changes the extended attributes of files and directories.

    `any_keeps` tells whether any namespace of the mount keeps them. Every method raises
    FilesystemError and RemoteError.
    """

    def __init__(
        self,
        lookup: Lookup,
        changes: AttributeChanges,
        permissions: Permissions,
        *,
        any_keeps: bool,
    ) -> None:
        self._lookup = lookup
        self._changes = changes
        self._permissions = permissions
        self.any_keeps = any_keeps

    async def get(self, ino: int, name: bytes) -> bytes:
        """Return the value of an attribute. Raises NoAttribute."""
        _check_name(name)
        node = await self._lookup.getattr(ino)
        _keeper(node)
        await self._permissions.check_access(node, os.R_OK)
        value = dict(node.entry.xattrs).get(name)
        if value is None:
            raise NoAttribute("there is no such attribute")
        return value

    async def list(self, ino: int) -> list[bytes]:
        """Return the names of all attributes; none of a symbolic link, whose values the kernel
        hides."""
        node = await self._lookup.getattr(ino)
        _keeper(node)
        if not (node.is_regular or node.is_directory):
            return []
        return [name for name, _ in node.entry.xattrs]

    async def set(self, ino: int, name: bytes, value: bytes) -> None:
        """Set an attribute. Raises AttributesFull where all together are too long."""
        _check_name(name)
        node = await self._lookup.getattr(ino)
        after = changed_xattrs(node.entry.xattrs, {name: value})
        if len(xattrs_text(after)) > XATTRS_TEXT_BYTES:
            raise AttributesFull("the extended attributes of a file on S3 have some 1 KiB in all")
        await self._change(node, {name: value})

    async def remove(self, ino: int, name: bytes) -> None:
        """Remove an attribute. Raises NoAttribute."""
        await self.get(ino, name)
        await self._change(await self._lookup.getattr(ino), {name: None})

    async def _change(self, node: Node, changes: dict[bytes, bytes | None]) -> None:
        if node.namespace is None or node.namespace.read_only:
            raise ReadOnly("attributes can't be changed here")
        namespace = _keeper(node)
        await self._permissions.check_access(node, os.W_OK)
        await self._changes.change(namespace, node, Attributes(xattrs=changes))


def _check_name(name: bytes) -> None:
    if not is_kept_xattr(name):
        raise NotSupported("extended attributes have names that begin with user.")
    if name == b"user.":
        raise InvalidRequest("the attribute has no name")


def _keeper(node: Node) -> Namespace:
    if node.namespace is None or not node.namespace.keeps_xattrs:
        raise NotSupported("there are no extended attributes here")
    return node.namespace
