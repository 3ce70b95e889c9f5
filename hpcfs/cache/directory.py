"""The cache directory itself: it is made, locked for one mount, and made anew if it was removed."""

from __future__ import annotations

import fcntl
import logging
import os
from pathlib import Path

from hpcfs.system import paths

log = logging.getLogger(__name__)

_COPY_BYTES = 1024 * 1024


class CacheUnusable(Exception):
    """The cache directory can't be used. The message is a sentence for the user."""


class CacheDirectory:
    """A locked cache directory; `CacheDirectory.take` makes one. All methods do I/O."""

    def __init__(self, directory: Path, holder: str, lock_fd: int) -> None:
        self.directory = directory
        self._holder = holder
        self._lock_fd = lock_fd

    @classmethod
    def take(cls, directory: Path, holder: str) -> CacheDirectory:
        """Make the directory if needed, and lock it. `holder` describes the mount to others who
        find the cache locked. Raises CacheUnusable."""
        return cls(directory, holder, _lock(directory, holder))

    def is_there(self) -> bool:
        """Return whether the directory is the one that was locked."""
        try:
            found = os.stat(self.directory / "lock")
        except OSError as error:
            log.debug("the cache directory is gone: %s", error)
            return False
        return os.path.samestat(found, os.fstat(self._lock_fd))

    def take_again(self) -> None:
        """Make and lock the directory once more, for this user alone. Raises CacheUnusable, and
        SetupError where others could change what is in it."""
        paths.make_private(self.directory)
        lock_fd = _lock(self.directory, self._holder)
        os.close(self._lock_fd)
        self._lock_fd = lock_fd

    def release(self) -> None:
        """Release the lock."""
        os.close(self._lock_fd)


def _lock(directory: Path, holder: str) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock_fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CacheUnusable(
            f"the cache directory {directory} can't be used: {error.strerror}"
        ) from None
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held = os.pread(lock_fd, 4096, 0).decode(errors="replace").strip()
        os.close(lock_fd)
        raise CacheUnusable(
            f"the cache {directory} is in use by {held or 'another mount'}"
        ) from None
    try:
        (directory / "data").mkdir(mode=0o700, exist_ok=True)
        os.ftruncate(lock_fd, 0)
        os.pwrite(lock_fd, holder.encode(), 0)
    except OSError as error:  # a full disk: what is read goes through memory
        log.warning("the cache directory %s takes nothing: %s", directory, error.strerror)
    return lock_fd


def copied(fd: int, path: str) -> int:
    """Copy an open file, which may have lost its name, to a new file `path`, holes included; return
    the descriptor of the copy, which is on the disk. Raises OSError; then there is no such file."""
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(fd).st_size
        os.ftruncate(copy, size)
        offset = 0
        while offset < size:
            data = os.pread(fd, _COPY_BYTES, offset)
            if data.strip(b"\0"):
                _write_all(copy, data, offset)
            offset += len(data) or _COPY_BYTES
        os.fsync(copy)  # some file systems say only now that there is no room
    except BaseException:
        os.close(copy)
        os.unlink(path)
        raise
    return copy


def _write_all(fd: int, data: bytes, offset: int) -> None:
    """A disk that gets full takes a part, and refuses the next call only."""
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view = view[count:]
        offset += count


def leads_to(path: str, fd: int) -> bool:
    """Return whether the path is a name of this open file. Raises OSError."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except (FileNotFoundError, NotADirectoryError):
        return False
