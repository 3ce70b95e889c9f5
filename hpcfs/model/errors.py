"""What a remote, or the way to it, can refuse: the errors that cross from a transfer process to the
daemon. protocol/messages.py has them on the wire, and shows them to both sides.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec

MAX_MESSAGE = 1000
"""Letters. A server's own words may be a part of a message, and there is no end to those."""


class HpcfsError(Exception):
    """Base of all. The argument is one sentence for the user, without a trailing period."""

    @property
    def message(self) -> str:
        text = str(self.args[0]) if self.args else type(self).__name__
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}… (cut)"


class SetupError(HpcfsError):
    """What the user asked for can't be set up; the sentence says what to do next. The command line
    prints it and exits with 1."""


# --- what only a mount refuses --------------------------------------------------------------------


class FilesystemError(HpcfsError):
    """An operation that the mount refuses, whatever the remote would say."""


class LeadsOut(FilesystemError):
    """A symbolic link of the remote leads out of its namespace, and is not to be followed."""


class NoSuchKind(FilesystemError):
    """The remote has no devices, sockets and FIFOs; or no hard links."""


class Stale(FilesystemError):
    """The file changed on the remote since it was opened; open it again."""


class JournalFull(FilesystemError):
    """So much waits to be uploaded that no more may be written."""


class NoAttribute(FilesystemError):
    """There is no extended attribute of this name."""


class AttributesFull(FilesystemError):
    """There is no room for another extended attribute, or for so large a one."""


class BadHandle(FilesystemError):
    """The file was not opened for this."""


# --- what a remote, or the way to it, refuses -----------------------------------------------------


class RemoteError(HpcfsError):
    """A request that the remote, or the way to it, did not carry out. The mount raises the same
    errors where it knows the answer without asking.

    `lasting` errors are not cured by trying again: a refused credential must not be retried on its
    own.
    """

    lasting: ClassVar[bool] = False


class NotFound(RemoteError):
    """No entry has this name."""


class AlreadyExists(RemoteError):
    """The name is taken, and the request asked for a new one."""


class PermissionDenied(RemoteError):
    """The remote user may not do this to this entry."""


class NotOwner(PermissionDenied):
    """Only the owner may do this: change a mode, an owner or times, or, where the directory is
    sticky, rename or remove."""


class ReadOnly(PermissionDenied):
    """Nobody may change anything there now: a file system that is mounted read-only, or a server
    that only reads."""


class NotADirectory(RemoteError):
    """A directory was needed and something else is there."""


class IsADirectory(RemoteError):
    """Something else than a directory was needed."""


class DirectoryNotEmpty(RemoteError):
    """Only an empty directory can be removed or replaced."""


class CrossDevice(RemoteError):
    """Two names are in different file systems of the remote: what one has can't be renamed or
    linked to the other, only copied."""


class InvalidName(RemoteError):
    """The remote can't hold this name (S3 keys are UTF-8; SFTP names have no NUL)."""


class NameTooLong(RemoteError):
    """The name or the path is longer than the remote accepts."""


class InvalidRequest(RemoteError):
    """The request makes no sense (a directory moved into itself, a negative size)."""


class NotSupported(RemoteError):
    """This kind of remote, or this server, has no such operation."""


class NoSpace(RemoteError):
    """The remote is full or the user's quota there is used up."""


class TooLarge(RemoteError):
    """The file would be larger than the remote accepts (5 TiB on S3)."""


class Changed(RemoteError):
    """The file's content on the remote is no longer the version that was asked for."""


class Conflict(RemoteError):
    """The remote has another version than the one that was to be changed: nothing was written."""


class PiecesLost(RemoteError):
    """What was sent ahead of an upload is not there any more: all of it must be sent again."""


class Unreachable(RemoteError):
    """No connection to the site now; a later attempt may succeed."""


class NotConnected(Unreachable):
    """No connection could be made: nothing was sent."""


class TimedOut(Unreachable):
    """The deadline passed without an answer."""


class Throttled(Unreachable):
    """The server is there, and wants to be asked less often."""


class AccessRefused(RemoteError):
    """The site refused the login or the credentials; only the user can mend that."""

    lasting = True


class HostKeyRefused(RemoteError):
    """The server's host key is unknown or changed; only the user can decide to trust it."""

    lasting = True


class WrongSettings(RemoteError):
    """What the configuration names is not there: no such bucket, host name or key file."""

    lasting = True


class NoService(WrongSettings):
    """The login is accepted and there is nothing behind it: the next one would end in the same way,
    unless an earlier one did not."""


class ProtocolError(RemoteError):
    """The remote answered something that makes no sense."""


class CacheFull(RemoteError):
    """The local disk took no more bytes while something was fetched into the cache."""


class CacheFileGone(RemoteError):
    """The cache file is not there, as the daemon went on without it, or can't be opened."""


class RemoteFailure(RemoteError):
    """The remote reported a failure that has no better class."""


def _all_errors(base: type[RemoteError]) -> list[type[RemoteError]]:
    return [base] + [found for child in base.__subclasses__() for found in _all_errors(child)]


ERRORS: dict[str, type[RemoteError]] = {cls.__name__: cls for cls in _all_errors(RemoteError)}


class Failure(msgspec.Struct, frozen=True):
    """A `RemoteError` on the wire."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: RemoteError) -> Failure:
        return cls(type(error).__name__, error.message)

    def error(self) -> RemoteError:
        return ERRORS.get(self.kind, RemoteFailure)(self.message)
