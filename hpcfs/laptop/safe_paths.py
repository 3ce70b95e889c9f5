"""Resolves paths below a folder so that no name leads out of it, despite concurrent renames.

Each component of a path is opened on its own, relative to the directory before it, and never
through a symlink: a link is read, and followed by hand from where it is. `..` returns to the
directory from which we came. So there is no window between a check and its use, and a path that
leads above the top is refused. openat2(2) with RESOLVE_BENEATH does the same, but only Linux has
it.

The final operation uses the open parent directory and the last name (the *at calls of POSIX),
without following a link.
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
"""Symlinks followed in one path, as in Linux (path_resolution(7))."""
MAX_STEPS = 2048
"""Path components walked, those in links included. 40 links of 4 KiB each lead through 55,000,
which takes 0.1 s and can be requested with a few bytes."""
MAX_DEPTH = 256
"""Directories that are open during a walk; a process may have 1024 files."""
_PATH_ONLY = getattr(os, "O_PATH", os.O_RDONLY)
_DIRECTORY = _PATH_ONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PROC = Path("/proc/self/fd")
TOP = b"."


@dataclass(frozen=True, slots=True)
class SafeEntry:
    """A name in an open directory, as the *at calls take it. The top of a folder is "." in
    itself."""

    parent: int
    name: bytes

    def stat(self) -> os.stat_result:
        """Return the entry's status; a symlink is not followed. Raises OSError."""
        return os.stat(self.name, dir_fd=self.parent, follow_symlinks=False)

    def open(self, flags: int, mode: int = 0o666) -> int:
        """Open a regular file, and return its descriptor. Raises OSError.

        Opening a device or a FIFO affects it, or the process at its other end. So the type is
        checked first, and opening does not block for a file that replaced it since.
        """
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
        """Change the mode without following a link. Linux had no call for this before 6.6
        (fchmodat2): the descriptor's name in /proc leads to the opened file, and nowhere else."""
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


class SharedFolder:
    """A shared folder, open for as long as it is shared."""

    def __init__(self, directory: Path) -> None:
        self._top = os.open(directory, _PATH_ONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def close(self) -> None:
        """Close the folder."""
        os.close(self._top)

    @contextmanager
    def entry(self, path: Sequence[bytes], *, follow: bool = False) -> Iterator[SafeEntry]:
        """Resolve a path; with `follow` also a link at its end. The entry itself may be missing.
        Raises OSError."""
        walk = _Walk(self._top)
        try:
            yield walk.to(path, follow=follow)
        finally:
            walk.close()

    @contextmanager
    def directory(self, path: Sequence[bytes]) -> Iterator[int]:
        """Open a directory, and yield a descriptor that can be listed. Raises OSError."""
        with self.entry(path, follow=True) as entry:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            opened = os.open(entry.name, flags, dir_fd=entry.parent)
        try:
            yield opened
        finally:
            os.close(opened)


class _Walk:
    """One resolution: holds the directories on the way, each of them open."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._opened: list[int] = []
        self._links = 0
        self._steps = 0

    def close(self) -> None:
        """Close the directories on the way."""
        for descriptor in self._opened:
            os.close(descriptor)
        self._opened.clear()

    @property
    def _here(self) -> int:
        return self._opened[-1] if self._opened else self._top

    def to(self, path: Sequence[bytes], *, follow: bool) -> SafeEntry:
        """Walk the path, and return its last entry. Raises OSError."""
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
                target = [name]  # no longer a link: somebody made it a directory meanwhile
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
        """Return the link's target as components; None where the name is no link, or is missing."""
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
