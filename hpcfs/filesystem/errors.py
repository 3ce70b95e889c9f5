"""What the filesystem itself refuses, beside what a remote refuses (transfer/messages.py)."""

from __future__ import annotations


class FilesystemError(Exception):
    """An operation that the mount refuses; kernel/errno.py says with which errno."""

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class NoEntry(FilesystemError):
    """No entry has this name."""


class Exists(FilesystemError):
    """The name is taken."""


class NotDirectory(FilesystemError):
    """A directory was needed."""


class IsDirectory(FilesystemError):
    """Something else than a directory was needed."""


class NotPermitted(FilesystemError):
    """The mode bits of a file of the user's own forbid it."""


class ReadOnly(FilesystemError):
    """The namespace is read-only, or this is the top directory, which only lists namespaces."""


class CrossNamespace(FilesystemError):
    """Names of two namespaces can't be joined by a rename or a link; programs then copy."""


class Unsupported(FilesystemError):
    """hpcfs has no such operation."""


class LeadsOut(FilesystemError):
    """A symbolic link of the remote leads out of its namespace, and is not to be followed."""


class NoSuchKind(FilesystemError):
    """The remote has no devices, sockets and FIFOs; or no hard links."""


class Invalid(FilesystemError):
    """Arguments that make no sense."""


class NameLong(FilesystemError):
    """A name of more than 255 bytes."""


class Stale(FilesystemError):
    """The file changed on the remote since it was opened; open it again."""


class CacheFull(FilesystemError):
    """The local disk has no room for the cache."""


class JournalFull(FilesystemError):
    """So much waits to be uploaded that no more may be written."""


class NoAttribute(FilesystemError):
    """There is no extended attribute of this name."""


class AttributesFull(FilesystemError):
    """There is no room for another extended attribute, or for so large a one."""


class BadHandle(FilesystemError):
    """The file was not opened for this."""
