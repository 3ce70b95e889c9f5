"""Reads and writes the daemon's cache files: the bytes' way between a remote and the disk.

Calls that block on the disk are made in threads (worker/main.py).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from hpcfs.model.entries import BLOCK_BYTES, IN_MEMORY
from hpcfs.model.errors import CacheFileGone, CacheFull, RemoteFailure

_MOST_BUFFERS = 1024  # IOV_MAX, writev(2)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong, ctypes.c_uint)
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


class CacheSource:
    """The bytes of a cache file as the source of an upload. Raises CacheFileGone where it can't be
    opened."""

    def __init__(self, path: str, size: int) -> None:
        self.size = size
        self.name = os.path.basename(path)
        """No other cache file has it, whatever the mount."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CacheFileGone(f"the cache file can't be read: {error.strerror}") from None

    def read(self, offset: int, length: int) -> bytes:
        """Read a range of the file; where the file is shorter there are zeros. Raises RemoteFailure
        beyond `size`."""
        if offset + length > self.size:
            raise RemoteFailure("an upload asked for bytes beyond the file's end")
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:  # a hole at the end: the cache file is shorter than the file it stands for
                return data + bytes(length - len(data))
            data += more
        return data

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


Clock = Callable[[], float]


def waiting_clock() -> float:
    """Return seconds of a clock that stands still while this thread runs, or could if a processor
    were free: on a busy machine writing takes long whatever the disk does."""
    return time.monotonic() - time.thread_time() - _run_delay()


def _run_delay() -> float:
    """Seconds for which this thread could have run and did not; 0 where Linux does not tell
    (Documentation/scheduler/sched-stats.rst: the second number, in nanoseconds)."""
    try:
        fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0.0
    try:
        return int(os.read(fd, 100).split()[1]) / 1e9
    finally:
        os.close(fd)


Borrow = Callable[[str], int]


def lend_nothing(name: str) -> int:
    """Raise CacheFileGone: nobody lends files in memory."""
    raise CacheFileGone("there are no cache files in memory")


@dataclass(frozen=True)
class Stored:
    """The outcome of storing a range."""

    checksums: list[int]
    """Of each block."""
    seconds: float
    """That the disk was waited for, without what waited for a thread or a processor, was copied, or
    was only done early."""


class CacheDisk:
    """The disk with the cache files: what is fetched is stored on it.

    Small pieces are stored at once: a thread would cost more than the copy into the page cache.
    What a large fetch stored leaves the page cache again once the reader has passed by, as the
    bytes are there a second time, as the mount's own. So they are written to the disk early, and
    forgotten DISTANCE behind. Pages that were just freed are taken next: that is less memory, and
    where fresh memory is slow (virtual machines) less time. Measured on one: 1 GiB over loopback in
    3.7 to 4.1 s instead of 4.9 to 5.1.

    A disk that does not keep up must not slow a reader: then neither is done for a while.
    """

    DISTANCE = 64 * 1024 * 1024
    """More than any window (site/bandwidth.py)."""
    SMALL_BYTES = 64 * 1024
    LARGE_BYTES = 512 * 1024
    SLOW_SECONDS = 0.02
    PAUSE_SECONDS = 10.0

    def __init__(
        self,
        now: Clock = time.monotonic,
        waited: Clock = waiting_clock,
        borrow: Borrow = lend_nothing,
    ) -> None:
        """`borrow` gives a descriptor for the name of a file in memory."""
        self._borrow = borrow
        self._now = now
        self._waited = waited
        self._slow_until = 0.0

    def is_quick(self, length: int) -> bool:
        """Return whether storing that many bytes will not be noticed."""
        return length <= self.SMALL_BYTES and self._now() >= self._slow_until

    def store(self, path: str, offset: int, pieces: Sequence[bytes | bytearray]) -> Stored:
        """Write consecutive pieces of a range into its cache file.

        `offset` is where a block starts. Raises CacheFull and CacheFileGone.
        """
        length = sum(map(len, pieces))
        clock = self._waited if length > self.SMALL_BYTES else self._now
        began = clock()
        fd, in_memory = _open(path, self._borrow)
        try:
            _write(fd, offset, pieces)
            written = clock()
            if length >= self.LARGE_BYTES and self._now() >= self._slow_until and not in_memory:
                self._recycle(fd, offset, length)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CacheFull("the local disk with the cache is full") from None
            if error.errno in (errno.EIO, errno.EROFS):
                raise CacheFull(f"the local disk with the cache fails: {error.strerror}") from None
            raise
        finally:
            os.close(fd)
        if clock() - began > self.SLOW_SECONDS and not in_memory:
            self._slow_until = self._now() + self.PAUSE_SECONDS
        return Stored(list(_checksums(pieces)), max(0.0, written - began))

    def _recycle(self, fd: int, offset: int, length: int) -> None:
        _libc.sync_file_range(fd, offset, length, _SYNC_FILE_RANGE_WRITE)  # advice: may fail
        if offset >= self.DISTANCE:
            os.posix_fadvise(fd, offset - self.DISTANCE, length, os.POSIX_FADV_DONTNEED)


def _open(path: str, borrow: Borrow) -> tuple[int, bool]:
    """-> (descriptor, whether it is a file in memory), see messages.Fetch."""
    if path.startswith(IN_MEMORY):
        return borrow(path.removeprefix(IN_MEMORY)), True
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC), False
    except OSError as error:
        raise CacheFileGone(f"the cache file can't be opened: {error.strerror}") from None


class Borrower:
    """Asks the daemon for its files in memory, over a socket of their own: /proc/PID/fd is closed
    to us, as the daemon dumps no memory (system/dumps.py). Called in threads, too."""

    SECONDS = 5.0

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()
        sock.settimeout(self.SECONDS)

    def borrow(self, name: str) -> int:
        """Return a descriptor, to be closed by the caller. Raises CacheFileGone."""
        try:
            with self._lock:
                self._socket.send(name.encode())
                while True:
                    answer, lent, _, _ = socket.recv_fds(self._socket, len(name) + 1, 1)
                    if not answer or answer == name.encode():
                        break
                    for fd in lent:  # for a question that was given up
                        os.close(fd)
        except OSError as error:
            raise CacheFileGone(f"the daemon lends no file: {error}") from None
        if not lent:
            raise CacheFileGone("the cache file in memory is another one by now")
        return lent[0]


def _write(fd: int, offset: int, pieces: Sequence[bytes | bytearray]) -> None:
    """The pieces are not joined first: that would cost a copy of everything."""
    waiting = [memoryview(piece) for piece in pieces if piece]
    first = 0
    while first < len(waiting):
        done = os.pwritev(fd, waiting[first : first + _MOST_BUFFERS], offset)
        offset += done
        while first < len(waiting) and done >= len(waiting[first]):
            done -= len(waiting[first])
            first += 1
        if done:
            waiting[first] = waiting[first][done:]


def _checksums(pieces: Sequence[bytes | bytearray]) -> Iterator[int]:
    """xxh3_64 of each block, never 0 (see cache/blocks.py)."""
    digest = xxhash.xxh3_64()
    room = BLOCK_BYTES
    for piece in pieces:
        view = memoryview(piece)
        while len(view) >= room:
            digest.update(view[:room])
            yield digest.intdigest() or 1
            digest.reset()
            view = view[room:]
            room = BLOCK_BYTES
        digest.update(view)
        room -= len(view)
    if room < BLOCK_BYTES:
        yield digest.intdigest() or 1
