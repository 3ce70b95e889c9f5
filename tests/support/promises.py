"""A program that works on a mount and keeps account of what it was promised.

What a call returned for is acknowledged. The one call that was under way when something was
killed may have done its work or not; of a file that was being written any beginning may be there,
or, in old content, any of the blocks. Nothing else may differ: no zeros, no mix, no name lost or
come back.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

CHUNK = 4096
TEMPORARY = re.compile(r"\.hpcfs-[0-9a-f]{12}$")
"""What replaces a file on SFTP; the next attempt removes what a killed one left."""
STALE_SECONDS = 5.0
Seen = Mapping[str, bytes]
"""Contents by path."""
Pieces = list[tuple[int, bytes]]


@dataclass(frozen=True)
class Doubt:
    """The call under way: the paths that it is about, and what is wrong with what they are now.
    `what` is for the reader of a failure."""

    what: str
    paths: frozenset[str]
    problem: Callable[[Seen], str]


@dataclass
class Account:
    """`files` and `directories` are what the mount must show; `remote` is what must be on the
    remote at this moment; `attributes` are modes, and times in seconds."""

    files: dict[str, bytes]
    directories: set[str]
    attributes: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    remote: dict[str, bytes] = field(default_factory=dict)
    doubt: Doubt | None = None

    @property
    def doubtful(self) -> frozenset[str]:
        return self.doubt.paths if self.doubt else frozenset()

    def problems_of(self, seen: Seen) -> list[str]:
        """What must not be as it is seen through the mount."""
        return [*_differences(self.files, seen, self.doubtful), *self._problem(seen)]

    def _problem(self, seen: Seen) -> list[str]:
        if self.doubt is None:
            return []
        found = self.doubt.problem({path: seen[path] for path in self.doubt.paths & seen.keys()})
        return [f"{self.doubt.what}: {found}"] if found else []

    def problems_on_remote(self, seen: Seen) -> list[str]:
        """What must be there already, whatever else is."""
        wanted = {path: data for path, data in self.remote.items() if path not in self.doubtful}
        return _differences(wanted, {path: seen[path] for path in wanted.keys() & seen.keys()}, ())


def _differences(wanted: Seen, seen: Seen, but: frozenset[str] | tuple[()]) -> list[str]:
    lines = []
    for path in sorted((wanted.keys() | seen.keys()) - set(but)):
        if path not in seen:
            lines.append(f"{path} is missing")
        elif path not in wanted:
            lines.append(f"{path} is there, with {describe(seen[path])}")
        elif wanted[path] != seen[path]:
            lines.append(f"{path} has {describe(seen[path])} instead of {describe(wanted[path])}")
    return lines


def describe(data: bytes | None) -> str:
    if data is None:
        return "nothing"
    zeros = sum(not data[at : at + CHUNK].strip(b"\0") for at in range(0, len(data), CHUNK))
    return f"{len(data)} bytes ({data[:4].hex()}…{data[-4:].hex()}, {zeros} chunks of zeros)"


class Program:
    """Works below `top`. Any call raises OSError when something was killed; then it is over."""

    def __init__(self, top: Path, seeds: Mapping[str, bytes], *, back: bool, s3: bool) -> None:
        self.top = top
        self._back = back
        self._s3 = s3
        parents = {str(parent) for path in seeds for parent in Path(path).parents} - {"."}
        self.account = Account(dict(seeds), parents, remote=dict(seeds))

    @contextmanager
    def _doing(self, what: str, paths: set[str], problem: Callable[[Seen], str]) -> Iterator[None]:
        self.account.doubt = Doubt(what, frozenset(paths), problem)
        yield
        self.account.doubt = None

    # --- files ----------------------------------------------------------------------------------

    def write(
        self, path: str, pieces: Pieces, flags: int = os.O_CREAT | os.O_TRUNC, fsync_after: int = 0
    ) -> None:
        """Open, write the pieces, close; fsync after so many of them."""
        account = self.account
        old = account.files.get(path)
        done = b"" if old is None or flags & os.O_TRUNC else old
        final = written(done, pieces)
        if self._back:
            account.remote.pop(path, None)
        with self._doing(f"write {path}", {path}, lambda s: _torn(s.get(path), old, done, final)):
            account.attributes.pop(path, None)
            fd = os.open(self.top / path, os.O_RDWR | flags, 0o640)
            try:
                for number, (offset, data) in enumerate(pieces, 1):
                    _pwrite(fd, data, offset)
                    if number == fsync_after:
                        os.fsync(fd)
                        old = done = written(done, pieces[:number])
            except BaseException:
                with suppress(OSError):
                    os.close(fd)
                raise
            os.close(fd)
        account.files[path] = final
        if not self._back:
            account.remote[path] = final

    def truncate(self, path: str, size: int) -> None:
        before = self.account.files[path]
        after = before[:size]
        if self._back:
            self.account.remote.pop(path, None)
        with self._doing(f"truncate {path}", {path}, _one_of({path: before}, {path: after})):
            os.truncate(self.top / path, size)
        self.account.files[path] = after
        self.account.attributes.pop(path, None)
        if not self._back:
            self.account.remote[path] = after

    def set_attributes(self, path: str, mode: int, mtime: int) -> None:
        now = {path: self.account.files[path]}
        with self._doing(f"set attributes of {path}", {path}, _one_of(now)):
            os.chmod(self.top / path, mode)
            os.utime(self.top / path, (mtime, mtime))
        self.account.attributes[path] = mode, mtime

    # --- names ----------------------------------------------------------------------------------

    def unlink(self, path: str) -> None:
        before = {path: self.account.files[path]}
        with self._doing(f"unlink {path}", {path}, _one_of(before, {})):
            os.unlink(self.top / path)
        for known in (self.account.files, self.account.remote, self.account.attributes):
            known.pop(path, None)

    def rename(self, path: str, target: str) -> None:
        account = self.account
        data = account.files[path]
        before = {one: account.files[one] for one in (path, target) if one in account.files}
        states = [before, {target: data}]
        if self._s3:
            states.append({path: data, target: data})
        with self._doing(f"rename {path} to {target}", {path, target}, _one_of(*states)):
            os.rename(self.top / path, self.top / target)
        for known in (account.remote, account.attributes):
            known.pop(target, None)
        for known in (account.files, account.remote, account.attributes):
            if path in known:
                known[target] = known.pop(path)  # type: ignore[assignment]

    def make_directory(self, path: str) -> None:
        with self._doing(f"mkdir {path}", {path}, lambda _: ""):
            os.mkdir(self.top / path)
        self.account.directories.add(path)

    def remove_directory(self, path: str) -> None:
        with self._doing(f"rmdir {path}", {path}, lambda _: ""):
            os.rmdir(self.top / path)
        self.account.directories.discard(path)

    def rename_directory(self, path: str, target: str) -> None:
        account = self.account

        def moved(name: str) -> str:
            return target + name.removeprefix(path) if f"{name}/".startswith(f"{path}/") else name

        before = {name: data for name, data in account.files.items() if moved(name) != name}
        after = {moved(name): data for name, data in before.items()}
        directories = {one for one in account.directories if moved(one) != one}
        paths = before.keys() | after.keys() | directories | set(map(moved, directories))

        def problem(seen: Seen) -> str:
            if not self._s3:
                return _one_of(before, after)(seen)
            for name, data in before.items():
                here = [seen[one] for one in (name, moved(name)) if one in seen]
                if not here or any(one != data for one in here):
                    return f"{name} is {[describe(one) for one in here]}"
            return ""

        with self._doing(f"rename {path} to {target}", set(paths), problem):
            os.rename(self.top / path, self.top / target)
        account.files = {moved(name): data for name, data in account.files.items()}
        account.remote = {moved(name): data for name, data in account.remote.items()}
        account.attributes = {moved(name): one for name, one in account.attributes.items()}
        account.directories = {moved(one) for one in account.directories}

    # --- what is there --------------------------------------------------------------------------

    def look(self) -> dict[str, bytes]:
        return {
            str(place.relative_to(self.top)): _read(place)
            for place in self.top.rglob("*")
            if not TEMPORARY.search(place.name) and place.is_file()
        }

    def problems(self, seen: Seen) -> list[str]:
        """Of what the mount shows now."""
        account = self.account
        lines = account.problems_of(seen)
        missing = [path for path in account.directories if not (self.top / path).is_dir()]
        lines += [f"the directory {path} is missing" for path in {*missing} - account.doubtful]
        for place in self.top.rglob("*"):
            path = str(place.relative_to(self.top))
            if place.is_dir() and path not in account.directories | account.doubtful:
                lines.append(f"the directory {path} is there")
        for path, (mode, mtime) in account.attributes.items():
            if path not in account.doubtful and path in seen:
                found = os.stat(self.top / path)
                if (found.st_mode & 0o777, int(found.st_mtime)) != (mode, mtime):
                    lines.append(f"{path} has mode {found.st_mode:o} and time {found.st_mtime}")
        return lines


def _read(place: Path) -> bytes:
    """An open that asked a moment before may not know of the version that was just uploaded."""
    deadline = time.monotonic() + STALE_SECONDS
    while True:
        try:
            return place.read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE or time.monotonic() > deadline:
                raise


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    """What the kernel cuts in two may be written in part."""
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def written(data: bytes, pieces: Pieces) -> bytes:
    content = bytearray(data)
    for offset, piece in pieces:
        content[offset : offset + len(piece)] = piece
    return bytes(content)


def _one_of(*states: Seen) -> Callable[[Seen], str]:
    def problem(seen: Seen) -> str:
        if any(seen == state for state in states):
            return ""
        return f"there is { ({path: describe(data) for path, data in seen.items()}) }"

    return problem


def _torn(seen: bytes | None, old: bytes | None, start: bytes, final: bytes) -> str:
    """`start` is what the file had when writing began, `old` what was acknowledged."""
    if seen == old:
        return ""
    if seen is None or not len(start) <= len(seen) <= max(len(final), len(start)):
        return f"there is {describe(seen)}; it had {describe(old)}"
    for at in range(0, len(seen), CHUNK):
        chunk = seen[at : at + CHUNK]
        if not any(one[at : at + CHUNK].startswith(chunk) for one in (start, final)):
            return f"other bytes at {at} of {describe(seen)}; it had {describe(old)}"
    return ""
