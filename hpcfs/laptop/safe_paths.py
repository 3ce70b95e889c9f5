"""A folder's entries, named so that no name leads out of it, whoever renames what meanwhile.

Each component of a path is opened on its own, below the directory before it, and never as a
symlink: a link is read and followed by hand, from where it is. `..` goes back to the directory we
came through. So there is no moment between a check and its use, and what leads above the top is
refused; the same as openat2(2) with RESOLVE_BENEATH, which only Linux has.

What is done at the end is done with the open parent directory and the last name (the *at calls of
POSIX), and without following a link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MAX_LINKS = 40
"""As Linux (path_resolution(7))."""
MAX_STEPS = 2048
"""Names on the way, those in links included: 40 links of 4 KiB each lead through 55,000, which
takes 0.1 s, and a request of some bytes asks for it."""
MAX_DEPTH = 256
"""Directories that are open meanwhile; a process may have 1024 files."""
_PATH_ONLY = getattr(os, "O_PATH", os.O_RDONLY)
_DIRECTORY = _PATH_ONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PROC = Path("/proc/self/fd")
TOP = b"."


@dataclass(frozen=True, slots=True)
class SafeEntry:
    """A name in an open directory: what the *at calls take. At the top of a folder it is "."."""

    parent: int
    name: bytes

    def stat(self) -> os.stat_result:
        return os.stat(self.name, dir_fd=self.parent, follow_symlinks=False)

    def open(self, flags: int, mode: int = 0o666) -> int:
        """A regular file. Raises OSError.

        To open a device or a FIFO is to do something to it, or to who waits at its other end: we
        look first, and for what was put there since, opening doesn't wait."""
        with suppress(FileNotFoundError):
            _check_regular(self.stat())
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        opened = os.open(self.name, flags, mode, dir_fd=self.parent)
        try:
            _check_regular(os.fstat(opened))
        except OSError:
            os.close(opened)
            raise
        return opened

    def chmod(self, mode: int) -> None:
        """Linux had no call for this before 6.6 (fchmodat2): the name in /proc leads to what was
        opened, and nowhere else."""
        if not hasattr(os, "O_PATH"):
            os.chmod(self.name, mode, dir_fd=self.parent, follow_symlinks=False)
            return
        opened = os.open(self.name, _PATH_ONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self.parent)
        try:
            os.chmod(_PROC / str(opened), mode)
        finally:
            os.close(opened)


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        code = {stat.S_IFDIR: errno.EISDIR, stat.S_IFLNK: errno.ELOOP}.get(
            stat.S_IFMT(found.st_mode), errno.EACCES
        )
        raise OSError(code, os.strerror(code))


class Folder:
    """A shared folder, open for as long as it is shared."""

    def __init__(self, directory: Path) -> None:
        self._top = os.open(directory, _PATH_ONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._top)

    @contextmanager
    def entry(self, path: Sequence[bytes], *, follow: bool = False) -> Iterator[SafeEntry]:
        """What the path names; with `follow`, where it leads if it is a link. The entry itself may
        be missing. Raises OSError."""
        walk = _Walk(self._top)
        try:
            yield walk.to(path, follow=follow)
        finally:
            walk.close()

    @contextmanager
    def directory(self, path: Sequence[bytes]) -> Iterator[int]:
        """A descriptor that can be listed."""
        with self.entry(path, follow=True) as entry:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            opened = os.open(entry.name, flags, dir_fd=entry.parent)
        try:
            yield opened
        finally:
            os.close(opened)


class _Walk:
    """The directories that were gone through, each of them open."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._opened: list[int] = []
        self._links = 0
        self._steps = 0

    def close(self) -> None:
        for descriptor in self._opened:
            os.close(descriptor)
        self._opened.clear()

    @property
    def _here(self) -> int:
        return self._opened[-1] if self._opened else self._top

    def to(self, path: Sequence[bytes], *, follow: bool) -> SafeEntry:
        todo = deque(path)
        while todo:
            name = todo.popleft()
            self._count_step()
            if name == b"..":
                self._up()
            elif todo:
                self._enter(name, todo)
            elif name not in (b"", TOP):
                target = self._link(name) if follow else None
                if target is None:
                    return SafeEntry(self._here, name)
                todo.extendleft(reversed(target))
        return SafeEntry(self._here, TOP)

    def _up(self) -> None:
        if not self._opened:
            raise PermissionError(errno.EACCES, "this leads out of what is shared")
        os.close(self._opened.pop())

    def _enter(self, name: bytes, todo: deque[bytes]) -> None:
        if name in (b"", TOP):
            return
        try:
            self._opened.append(os.open(name, _DIRECTORY, dir_fd=self._here))
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            target = self._link(name)
            if target is None:
                target = [name]  # no link any more: somebody made it a directory meanwhile
                self._count_link()
                if not stat.S_ISDIR(SafeEntry(self._here, name).stat().st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
            todo.extendleft(reversed(target))

    def _count_step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS or len(self._opened) > MAX_DEPTH:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))

    def _count_link(self) -> None:
        self._links += 1
        if self._links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))

    def _link(self, name: bytes) -> list[bytes] | None:
        """Where the link leads from here; None for what is no link, or is missing."""
        with suppress(FileNotFoundError):
            try:
                target = os.readlink(name, dir_fd=self._here)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return None
                raise
            self._count_link()
            if target.startswith(b"/"):
                raise PermissionError(errno.EACCES, "this link leads out of what is shared")
            return target.split(b"/")
        return None
