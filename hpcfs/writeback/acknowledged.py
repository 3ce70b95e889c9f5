"""Second names of the cache files whose close(2) was acknowledged in `back` mode.

A file in `pending/` is a hard link of a cache file that the journal has a row for. It does not
depend on the journal: where a damaged journal lost the row, or has an older one than was noted
last, the link tells so, and whatever deletes the cache file leaves the bytes.

    NAME        closed: the row in the journal has everything
    NAME.open   it was closed once, and is being written to again

The link is made after the row and removed before it, so that a kill in between leaves a row
without a link, which means nothing. An extended attribute (user.hpcfs.file) tells which file it is.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import msgspec

from hpcfs.content.record import Unconfirmed

log = logging.getLogger(__name__)

_ATTRIBUTE = "user.hpcfs.file"
_OPEN = ".open"


class Identity(msgspec.Struct, frozen=True, array_like=True):
    """Which file of which namespace a cache file belongs to; the fields are those of a row."""

    namespace: str
    origin: str
    path: bytes


class Acknowledged:
    """The links of one cache directory. Every call does I/O; none but `sync` waits for the disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.links: dict[str, str] = {}
        """The links' names by the names of the cache files."""
        self._has_unsynced = False
        self._is_possible = True
        """False once the file system refused a hard link."""

    @classmethod
    def open(cls, directory: Path) -> Acknowledged:
        """Read what an earlier mount left in this directory. Raises OSError."""
        made = cls(directory)
        for found in os.listdir(directory) if directory.exists() else ():
            made.links[found.removesuffix(_OPEN)] = found
        return made

    def is_closed(self, name: str) -> bool:
        """Return whether the file has a link, and was not being written to again."""
        return self.links.get(name) == name

    def path(self, name: str) -> Path:
        """Return the path of a link that exists."""
        return self._directory / self.links[name]

    def add(self, row: Unconfirmed) -> None:
        """Note that the journal has everything of a file. A file system without hard links, or
        without room for one, is logged: then there is the journal alone."""
        if not self._is_possible:
            return
        try:
            if row.name not in self.links:
                self._directory.mkdir(mode=0o700, exist_ok=True)
                self._link(row.data, self._directory / row.name)
            elif self.links[row.name] != row.name:
                self.path(row.name).rename(self._directory / row.name)
            self.links[row.name] = row.name
        except OSError as error:
            self._is_possible = error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV)
            log.warning("%s: no second name for what is pending: %s", row.data, error)

    def _link(self, data: str, place: Path) -> None:
        try:
            os.link(data, place)
        except FileExistsError:
            if not place.samefile(data):
                raise

    def identify(self, row: Unconfirmed) -> None:
        """Note on the cache file itself which file it is, where its file system can do that."""
        identity = msgspec.msgpack.encode(Identity(row.namespace, row.origin, row.path))
        try:
            os.setxattr(row.data, _ATTRIBUTE, identity)
        except OSError as error:
            log.debug("%s takes no extended attribute: %s", row.data, error)

    def identity(self, name: str) -> Identity | None:
        """Return which file a link belongs to, None where that is not known."""
        try:
            packed = os.getxattr(self.path(name), _ATTRIBUTE)
            return msgspec.msgpack.decode(packed, type=Identity)
        except (OSError, msgspec.MsgspecError) as error:
            log.info("%s does not tell which file it is: %s", self.path(name), error)
            return None

    def reopen(self, name: str) -> None:
        """Note that the file is about to be written to again. Raises OSError."""
        if self.is_closed(name):
            self.path(name).rename(self._directory / (name + _OPEN))
            self.links[name] = name + _OPEN

    def remove(self, name: str) -> None:
        """Remove a link that exists. Raises OSError."""
        self.path(name).unlink(missing_ok=True)
        del self.links[name]
        self._has_unsynced = True

    def sync(self) -> None:
        """Make what was removed stay so after a loss of power, before its row does: else the link
        would come back without one. Raises OSError."""
        if not self._has_unsynced:
            return
        self._has_unsynced = False
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
