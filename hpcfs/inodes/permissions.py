"""Checks of the mode bits of the user's own files and directories.

The remote decides: groups and access lists of a cluster are unknown here, so other people's entries
are never judged. But an open file is read from the cache, and S3 checks nothing at all.
"""

from __future__ import annotations

import os
import stat

from hpcfs.inodes.tree import Node
from hpcfs.model.errors import PermissionDenied
from hpcfs.protocol import messages as m
from hpcfs.site.namespace import Namespace

_FMODE_EXEC = 0x20  # linux/fs.h: opened to be executed, which needs no permission to read
_BITS = {os.R_OK: stat.S_IRUSR, os.W_OK: stat.S_IWUSR, os.X_OK: stat.S_IXUSR}


class Permissions:
    """Judges by the mode bits of what belongs to `uid`, the user whose mount it is.

    `gid` is the user's group; root may do anything. Raises PermissionDenied.
    """

    def __init__(self, uid: int, gid: int) -> None:
        self.uid = uid
        self.gid = gid

    def _lacks(self, node: Node, mask: int) -> bool:
        """Whether the entry is the user's own, and its mode does not allow all of `mask`
        (R_OK, W_OK, X_OK)."""
        if not self.uid or node.entry.uid != self.uid:
            return False
        return any(mask & one and not node.entry.mode & bit for one, bit in _BITS.items())

    async def check_access(self, node: Node, mask: int) -> None:
        """Check for access(2). Raises PermissionDenied, ReadOnly and RemoteError."""
        if mask & os.X_OK and node.is_regular and not node.entry.mode & 0o111:
            raise PermissionDenied("it is not executable")
        await self._check_own(node, mask)
        if mask & os.W_OK and node.is_regular and node.namespace:
            await self._check_writable(node, node.namespace)

    async def check_open(self, node: Node, flags: int) -> None:
        """Check for open(2) of a regular file, and with O_WRONLY for truncate(2).

        Raises PermissionDenied, ReadOnly and RemoteError.
        """
        mask = os.W_OK if flags & os.O_TRUNC else 0
        if flags & os.O_ACCMODE != os.O_RDONLY:
            mask |= os.W_OK
        if flags & os.O_ACCMODE != os.O_WRONLY and not flags & _FMODE_EXEC:
            mask |= os.R_OK
        await self._check_own(node, mask)
        if mask & os.W_OK and node.namespace:
            await self._check_writable(node, node.namespace)

    async def _check_writable(self, node: Node, namespace: Namespace) -> None:
        """Ask the remote about others' files: close(2) would be late to say it."""
        await namespace.check_takes_writes()
        capabilities = await namespace.capabilities()
        if (
            node.entry.uid == self.uid
            or capabilities.privileged
            or not capabilities.checks_permissions
        ):
            return
        if node.is_attached and not (node.content and node.content.is_dirty()):
            await namespace.do(m.CheckWritable(node.path))

    async def _check_own(self, node: Node, mask: int) -> None:
        if self._lacks(node, mask) and not (
            node.namespace and (await node.namespace.capabilities()).privileged
        ):
            raise PermissionDenied("the mode of this file of yours does not allow it")

    def check_made_here(self, directory: Node) -> None:
        """Check that a file may be created of which the remote does not hear yet."""
        if self._lacks(directory, os.W_OK):
            raise PermissionDenied("the directory's mode does not let you make files in it")

    async def check_directory(self, node: Node, mask: int) -> None:
        """Check a directory of a remote that does not check: X_OK to find a name in it, W_OK to
        change it."""
        if not self._lacks(node, mask) or node.namespace is None:
            return
        if not (await node.namespace.capabilities()).checks_permissions:
            raise PermissionDenied("the mode of this directory of yours does not allow it")
