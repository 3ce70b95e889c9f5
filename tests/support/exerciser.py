"""Random system calls on a directory of a mount and on a local one, compared after each.

The steps are data and name slots and paths, not what happens to be there: any selection of them
can be run, so that a failure is replayed by its seed and shrunk by leaving steps out. Every step
returns what a program would see of it (a value, or an errno); so does looking at what it touched.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SLOTS = 5
FOLDERS = ("", "d/", "e/", "d/d/")
FILES = ("a", "b", "c", "f")
PATHS = tuple(folder + name for folder in FOLDERS for name in (*FILES, "d", "e"))
POSITIONS = (0, 1, 100, 4095, 4096, 65_535, 65_536, 65_537, 131_072, 200_000, 262_144)
LENGTHS = (1, 10, 4096, 5000, 65_536, 70_000, 140_000)
MODES = (0o644, 0o600, 0o755, 0o444, 0o400, 0o640, 0o4755, 0o2755, 0o1644)
FOLDER_MODES = (0o755, 0o700, 0o750, 0o1777, 0o555)
TIMES = (0, 1, 1_000_000_000, 1_234_567_890, 2_000_000_000, 4_000_000_000)
FLAGS = (
    os.O_RDONLY,
    os.O_RDWR,
    os.O_WRONLY,
    os.O_RDWR | os.O_CREAT,
    os.O_RDWR | os.O_CREAT,
    os.O_WRONLY | os.O_CREAT | os.O_TRUNC,
    os.O_RDWR | os.O_CREAT | os.O_EXCL,
    os.O_RDWR | os.O_CREAT | os.O_APPEND,
    os.O_RDWR | os.O_TRUNC,
    os.O_RDONLY | os.O_NOFOLLOW,
    os.O_RDONLY | os.O_DIRECTORY,
)
NOW_SECONDS = 100
"""A time that is nearer to now than this was set by the clock, and not by utimensat."""
CLOCK_SECONDS = 3
"""By which the clocks of two file systems may differ."""

FAILING = 0.05
"""Of the steps that fail, so many are taken."""

Step = tuple[str, tuple[Any, ...]]
Outcome = tuple[str, object]

_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_UTIME_NOW, _UTIME_OMIT = (1 << 30) - 1, (1 << 30) - 2


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def utimensat(path: str, times: Sequence[int | None], *, descriptor: int = _AT_FDCWD) -> None:
    """Access and modification time in seconds; -1 is now, None leaves it. Links themselves."""
    pair = (_Timespec * 2)()
    for spec, given in zip(pair, times, strict=True):
        special = {None: _UTIME_OMIT, -1: _UTIME_NOW}.get(given)
        spec.seconds, spec.nanoseconds = (given or 0, 0) if special is None else (0, special)
    name = os.fsencode(path) if path else None
    flags = _AT_SYMLINK_NOFOLLOW if path else 0
    if _libc.utimensat(descriptor, name, pair, flags):
        raise OSError(ctypes.get_errno(), "utimensat")


def data_of(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


@dataclass
class Side:
    """One of the two directories, with the files that are open in it."""

    root: Path
    open: dict[int, int] = field(default_factory=dict)

    def do(self, step: Step) -> Outcome:
        name, arguments = step
        try:
            return "value", getattr(self, name)(*arguments)
        except OSError as error:
            return "errno", errno.errorcode[error.errno or 0]

    def at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def descriptor(self, slot: int) -> int:
        """Raises EBADF where nothing is open."""
        try:
            return self.open[slot]
        except KeyError:
            raise OSError(errno.EBADF, "no such slot") from None

    def close_all(self) -> None:
        for slot in list(self.open):
            self.close(slot)

    # --- open files ---

    def open_file(self, slot: int, path: str, flags: int, mode: int) -> None:
        opened = os.open(self.at(path), flags, mode)
        if slot in self.open:
            self.close(slot)
        self.open[slot] = opened

    def close(self, slot: int) -> None:
        os.close(self.open.pop(slot, -1))

    def pread(self, slot: int, position: int, length: int) -> bytes:
        return os.pread(self.descriptor(slot), length, position)

    def pwrite(self, slot: int, position: int, length: int, seed: int) -> int:
        return os.pwrite(self.descriptor(slot), data_of(seed, length), position)

    def write(self, slot: int, length: int, seed: int) -> int:
        return os.write(self.descriptor(slot), data_of(seed, length))

    def read(self, slot: int, length: int) -> bytes:
        return os.read(self.descriptor(slot), length)

    def seek(self, slot: int, position: int, whence: int) -> int:
        """Not in directories, where a position is the file system's own affair."""
        descriptor = self.descriptor(slot)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return 0
        return os.lseek(descriptor, position if whence == os.SEEK_SET else 0, whence)

    def ftruncate(self, slot: int, size: int) -> None:
        os.ftruncate(self.descriptor(slot), size)

    def fsync(self, slot: int) -> None:
        os.fsync(self.descriptor(slot))

    def fchmod(self, slot: int, mode: int, folder_mode: int) -> None:
        descriptor = self.descriptor(slot)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.fchmod(descriptor, folder_mode if is_folder else mode)

    def futimens(self, slot: int, times: tuple[int | None, int | None]) -> None:
        utimensat("", times, descriptor=self.descriptor(slot))

    def mmap_write(self, slot: int, position: int, seed: int) -> None:
        found = os.fstat(self.descriptor(slot))
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return
        with mmap.mmap(self.descriptor(slot), 0) as view:
            end = min(position + 100, len(view))
            view[position:end] = data_of(seed, max(end - position, 0))
            view.flush()

    # --- names ---

    def unlink(self, path: str) -> None:
        os.unlink(self.at(path))

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self.at(path), mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(self.at(path))

    def rename(self, path: str, target: str) -> None:
        os.rename(self.at(path), self.at(target))

    def link(self, path: str, target: str) -> None:
        os.link(self.at(path), self.at(target), follow_symlinks=False)

    def symlink(self, target: str, path: str) -> None:
        os.symlink(target, self.at(path))

    def truncate(self, path: str, size: int) -> None:
        os.truncate(self.at(path), size)

    def chmod(self, path: str, mode: int, folder_mode: int) -> None:
        """What a directory gets lets the tests go on."""
        is_folder = stat.S_ISDIR(os.stat(self.at(path)).st_mode)
        os.chmod(self.at(path), folder_mode if is_folder else mode)

    def utimens(self, path: str, times: tuple[int | None, int | None]) -> None:
        utimensat(self.at(path), times)

    # --- looking ---

    def readlink(self, path: str) -> str:
        return os.readlink(self.at(path))

    def listdir(self, path: str) -> list[str]:
        return sorted(os.listdir(self.at(path)))

    def content(self, path: str) -> bytes:
        return Path(self.at(path)).read_bytes()

    def access(self, path: str, mode: int) -> bool:
        return os.access(self.at(path), mode)

    def lstat(self, path: str) -> Look:
        return Look.of(os.lstat(self.at(path)))

    def stat(self, path: str) -> Look:
        return Look.of(os.stat(self.at(path)))

    def fstat(self, slot: int) -> Look:
        return Look.of(os.fstat(self.descriptor(slot)))


@dataclass
class Look:
    """What of stat(2) must be the same: a directory's and a link's size is its file system's."""

    mode: str
    size: int
    links: int
    mtime: float

    @classmethod
    def of(cls, found: os.stat_result) -> Look:
        is_file = stat.S_ISREG(found.st_mode)
        is_folder = stat.S_ISDIR(found.st_mode)
        size = found.st_size if is_file else 0
        links = 0 if is_folder else found.st_nlink
        return cls(stat.filemode(found.st_mode), size, links, found.st_mtime)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Look):
            return NotImplemented
        return (self.mode, self.size, self.links) == (other.mode, other.size, other.links) and (
            _same_time(self.mtime, other.mtime)
        )


def _same_time(one: float, other: float) -> bool:
    by_clock = abs(one - time.time()) < NOW_SECONDS
    return abs(one - other) <= CLOCK_SECONDS if by_clock else int(one) == int(other)


# --- steps ----------------------------------------------------------------------------------------


def steps(seed: int, count: int, scratch: Path, *, links: bool = True) -> list[Step]:
    """Most of them do something: of those that fail in the `scratch` directory, where they are
    tried, few are taken. `links`: also hard ones."""
    rnd = random.Random(seed)
    side = Side(empty(scratch))
    chosen: list[Step] = []
    try:
        for step in _any_steps(rnd, links=links):
            outcome, _ = side.do(step)
            if outcome == "value" or rnd.random() < FAILING:
                chosen.append(step)
            if len(chosen) == count:
                return chosen
    finally:
        side.close_all()
    raise AssertionError("there is no end of steps")


def _any_steps(rnd: random.Random, *, links: bool) -> Iterator[Step]:

    def path() -> str:
        return rnd.choice(PATHS)

    def slot() -> int:
        return rnd.randrange(SLOTS)

    def times() -> tuple[int | None, int | None]:
        return rnd.choice((None, -1, *TIMES)), rnd.choice((None, -1, *TIMES))

    makers: list[tuple[int, Callable[[], Step]]] = [
        (14, lambda: ("open_file", (slot(), path(), rnd.choice(FLAGS), rnd.choice(MODES)))),
        (8, lambda: ("close", (slot(),))),
        (8, lambda: ("pread", (slot(), rnd.choice(POSITIONS), rnd.choice(LENGTHS)))),
        (
            10,
            lambda: (
                "pwrite",
                (slot(), rnd.choice(POSITIONS), rnd.choice(LENGTHS), rnd.randrange(1000)),
            ),
        ),
        (6, lambda: ("write", (slot(), rnd.choice(LENGTHS), rnd.randrange(1000)))),
        (4, lambda: ("read", (slot(), rnd.choice(LENGTHS)))),
        (3, lambda: ("seek", (slot(), rnd.choice(POSITIONS), rnd.choice((0, 1, 2))))),
        (5, lambda: ("ftruncate", (slot(), rnd.choice(POSITIONS)))),
        (2, lambda: ("fsync", (slot(),))),
        (3, lambda: ("fchmod", (slot(), rnd.choice(MODES), rnd.choice(FOLDER_MODES)))),
        (3, lambda: ("futimens", (slot(), times()))),
        (2, lambda: ("mmap_write", (slot(), rnd.choice(POSITIONS), rnd.randrange(1000)))),
        (7, lambda: ("unlink", (path(),))),
        (5, lambda: ("mkdir", (path(), rnd.choice(FOLDER_MODES)))),
        (4, lambda: ("rmdir", (path(),))),
        (9, lambda: ("rename", (path(), path()))),
        (5 if links else 0, lambda: ("link", (path(), path()))),
        (3, lambda: ("symlink", (rnd.choice((*FILES, "d", "d/a", "none")), path()))),
        (3, lambda: ("truncate", (path(), rnd.choice(POSITIONS)))),
        (4, lambda: ("chmod", (path(), rnd.choice(MODES), rnd.choice(FOLDER_MODES)))),
        (4, lambda: ("utimens", (path(), times()))),
        (2, lambda: ("readlink", (path(),))),
        (5, lambda: ("listdir", (rnd.choice(("", "d", "e", "d/d", "a")),))),
        (5, lambda: ("content", (path(),))),
        (2, lambda: ("access", (path(), rnd.choice((os.R_OK, os.W_OK, os.X_OK))))),
        (4, lambda: ("lstat", (path(),))),
        (3, lambda: ("stat", (path(),))),
        (4, lambda: ("fstat", (slot(),))),
    ]
    weights = [weight for weight, _ in makers]
    while True:
        yield rnd.choices(makers, weights)[0][1]()


def looks_after(step: Step) -> Iterator[Step]:
    """What shows the effect of a step."""
    name, arguments = step
    for given in arguments[1:2] if name == "symlink" else arguments[:2]:
        if isinstance(given, str):
            yield "lstat", (given,)
        elif given is arguments[0] and isinstance(given, int):
            yield "fstat", (given,)


# --- comparing ------------------------------------------------------------------------------------


class Difference(AssertionError):
    pass


Excuse = Callable[[Step, Outcome, Outcome], bool]
"""(step, what the mount said, what the local file system said): whether that difference is known
and explained."""


def run(mount: Path, local: Path, todo: Sequence[Step], excused: Excuse) -> None:
    """Raises Difference at the first one that is not excused."""
    sides = Side(mount), Side(local)
    try:
        for number, step in enumerate(todo):
            for one in (step, *looks_after(step)):
                compare(sides, one, excused, f"step {number}: {_shown(step)}")
        compare_trees(sides, excused, "after the last step, with files open")
    finally:
        for side in sides:
            side.close_all()
    compare_trees(sides, excused, "after the last close")


def compare(sides: tuple[Side, Side], step: Step, excused: Excuse, where: str) -> None:
    found, wanted = (side.do(step) for side in sides)
    if found != wanted and not excused(step, found, wanted):
        raise Difference(
            f"{where}\n{_shown(step)}: the mount says {_brief(found, wanted)}, "
            f"the local file system {_brief(wanted, found)}"
        )


def compare_trees(sides: tuple[Side, Side], excused: Excuse, where: str) -> None:
    todo = [""]
    while todo:
        folder = todo.pop()
        compare(sides, ("listdir", (folder,)), excused, where)
        for name in os.listdir(sides[1].at(folder)):
            path = f"{folder}/{name}" if folder else name
            compare(sides, ("lstat", (path,)), excused, where)
            mode = os.lstat(sides[1].at(path)).st_mode
            if stat.S_ISDIR(mode):
                todo.append(path)
            else:
                look = "readlink" if stat.S_ISLNK(mode) else "content"
                compare(sides, (look, (path,)), excused, where)


def shrink(todo: list[Step], fails: Callable[[list[Step]], bool], seconds: float) -> list[Step]:
    """Fewer steps that still fail, as far as the time goes: halves, quarters... are left out."""
    deadline = time.monotonic() + seconds
    size = len(todo) // 2
    while size and time.monotonic() < deadline:
        start = 0
        while start < len(todo) and time.monotonic() < deadline:
            fewer = todo[:start] + todo[start + size :]
            if fails(fewer):
                todo = fewer
            else:
                start += size
        size //= 2
    return todo


def empty(folder: Path) -> Path:
    """The folder, made anew."""
    if folder.exists():
        for path, names, _ in os.walk(folder):
            for name in names:
                os.chmod(f"{path}/{name}", 0o700)
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def _shown(step: Step) -> str:
    name, arguments = step
    return f"{name}({', '.join(map(repr, arguments))})"


def _brief(outcome: Outcome, other: Outcome) -> str:
    """Of long bytes, where they begin to differ."""
    value, against = outcome[1], other[1]
    if not isinstance(value, bytes) or not isinstance(against, bytes):
        text = repr(value)
        return f"{outcome[0]} {text[:200]}"
    pairs = enumerate(zip(value, against, strict=False))
    start = next((at for at, (one, two) in pairs if one != two), min(len(value), len(against)))
    return f"{len(value)} bytes, which differ at {start}: {value[start : start + 16]!r}"
