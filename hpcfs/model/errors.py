"""All errors of hpcfs, in one tree:

    HpcfsError
        SetupError
        FilesystemError
            LeadsOut
            NoSuchKind
            Stale
            JournalFull
            NoAttribute
            AttributesFull
            BadHandle
            TooManyOpen
        RemoteError
            NotFound
            AlreadyExists
            PermissionDenied
                NotOwner
                ReadOnly
            NotADirectory
            IsADirectory
            DirectoryNotEmpty
            CrossDevice
            InvalidName
            NameTooLong
            InvalidRequest
            NotSupported
            NoSpace
            TooLarge
            Changed
            Conflict
            PiecesLost
            Unreachable
                NotConnected
                TimedOut
                Throttled
            AccessRefused
                LoginNeeded
            HostKeyRefused
            WrongSettings
                NoService
                    LoginEnded
            ProtocolError
            CacheFull
            CacheFileGone
            RemoteFailure

Subclasses of SetupError are defined beside the commands that raise them. A remote raises
RemoteErrors and nothing else. kernel/errno.py gives each class its errno, and
protocol/messages.py carries RemoteErrors to another process.
"""

from __future__ import annotations

from typing import ClassVar

MAX_MESSAGE = 1000
"""Letters. A server's own words may be a part of a message, and there is no end to those."""


class HpcfsError(Exception):
    """Base of all errors whose message is for the user: one sentence without a trailing period."""

    @property
    def message(self) -> str:
        """The sentence for the user, cut to MAX_MESSAGE letters."""
        text = str(self.args[0]) if self.args else type(self).__name__
        return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}… (cut)"


class SetupError(HpcfsError):
    """Raised where the user asked for something that can't be set up; the message says what to do
    next. The command line prints it and exits with 1."""


# --- what only a mount refuses --------------------------------------------------------------------


class FilesystemError(HpcfsError):
    """Raised for an operation that the mount refuses, whatever the remote would say."""


class LeadsOut(FilesystemError):
    """Raised for a symbolic link of the remote that leads out of its namespace."""


class NoSuchKind(FilesystemError):
    """Raised for devices, sockets, FIFOs and hard links that the remote does not have."""


class Stale(FilesystemError):
    """Raised for an open file that was replaced on the remote; the program has to open it again."""


class JournalFull(FilesystemError):
    """Raised for a write when so much waits to be uploaded that no more may be written."""


class NoAttribute(FilesystemError):
    """Raised when there is no extended attribute of this name."""


class AttributesFull(FilesystemError):
    """Raised when there is no room for another extended attribute, or for so large a one."""


class BadHandle(FilesystemError):
    """Raised for a read or write on a file that was not opened for it."""


class TooManyOpen(FilesystemError):
    """Raised when the daemon may not have more cache files open at once."""


# --- what a remote, or the way to it, refuses -----------------------------------------------------


class RemoteError(HpcfsError):
    """Raised for a request that the remote, or the way to it, did not carry out. The mount raises
    the same errors where it knows the answer without asking.

    `lasting` errors are not cured by trying again soon: a refused credential is offered again once
    it is another one, or rarely.
    """

    lasting: ClassVar[bool] = False
    is_told = False
    """Whether a remote said so, or the way to it; otherwise the mount did."""


class NotFound(RemoteError):
    """Raised when no entry has this name."""


class AlreadyExists(RemoteError):
    """Raised when the name is taken and the request asked for a new one."""


class PermissionDenied(RemoteError):
    """Raised when the remote user may not do this to this entry."""


class NotOwner(PermissionDenied):
    """Raised when only the owner may do this: change a mode, an owner or times, or, in a sticky
    directory, rename or remove."""


class ReadOnly(PermissionDenied):
    """Raised when nobody may change anything there now: the file system is mounted read-only, or
    the server only reads."""


class NotADirectory(RemoteError):
    """Raised when a directory is needed and something else is there."""


class IsADirectory(RemoteError):
    """Raised when something else than a directory is needed."""


class DirectoryNotEmpty(RemoteError):
    """Raised when a directory with entries is to be removed or replaced."""


class CrossDevice(RemoteError):
    """Raised when two names are in different file systems of the remote: what one has can't be
    renamed or linked to the other, only copied."""


class InvalidName(RemoteError):
    """Raised when the remote can't hold this name (S3 keys are UTF-8; SFTP names have no NUL)."""


class NameTooLong(RemoteError):
    """Raised when the name or the path is longer than the remote accepts."""


class InvalidRequest(RemoteError):
    """Raised when the request makes no sense (a directory moved into itself, a negative size)."""


class NotSupported(RemoteError):
    """Raised when this kind of remote, or this server, has no such operation."""


class NoSpace(RemoteError):
    """Raised when the remote is full or the user's quota there is used up."""


class TooLarge(RemoteError):
    """Raised when the file would be larger than the remote accepts (5 TiB on S3)."""


class Changed(RemoteError):
    """Raised when the file's content on the remote is no longer the version that was asked for."""


class Conflict(RemoteError):
    """Raised when the remote has another version than the one that was to be changed; nothing was
    written."""


class PiecesLost(RemoteError):
    """Raised when pieces that were sent of a file are not there any more: all of it must be sent
    again."""


class Unreachable(RemoteError):
    """Raised when there is no connection to the site now; a later attempt may succeed."""


class NotConnected(Unreachable):
    """Raised when no connection could be made, so that nothing was sent. While logging in: nobody
    answered, so that nobody minds another attempt soon."""


class TimedOut(Unreachable):
    """Raised when the deadline passed without an answer."""


class Throttled(Unreachable):
    """Raised when the server is there, and wants to be asked less often."""


class AccessRefused(RemoteError):
    """Raised when the site refuses the login or the credentials; only the user can mend that.
    `hpcfs login` tries again at once."""

    lasting = True


class LoginNeeded(AccessRefused):
    """Raised when only somebody at a terminal can log in: the site asks for a password or a second
    factor, or refused the one that was typed. Never tried again by itself."""


class HostKeyRefused(RemoteError):
    """Raised when the server's host key is unknown or changed; only the user can decide to trust
    it."""

    lasting = True


class WrongSettings(RemoteError):
    """Raised when the configuration names something that is not there: a bucket, a host, a key
    file."""

    lasting = True


class NoService(WrongSettings):
    """Raised when the login is accepted and no SFTP is behind it: the next login would end in the
    same way, unless an earlier one did not."""


class LoginEnded(NoService):
    """Raised when the server ends the connection while it lets us in, as sshd does with an account
    that has expired. Sites count that as a refusal; a link may break in that moment, too."""


class ProtocolError(RemoteError):
    """Raised when the remote answers something that makes no sense."""


class CacheFull(RemoteError):
    """Raised when the local disk takes no more bytes of the cache or of the journal."""


class CacheFileGone(RemoteError):
    """Raised when the local file for fetched bytes is not there any more, or can't be opened."""


class RemoteFailure(RemoteError):
    """Raised when the remote reports a failure that has no better class."""
