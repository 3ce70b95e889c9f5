"""The served files: made once for a run, the same for every contender.

    big/0.bin ... 4.bin    one incompressible file under five names (hard links)
    eight/0.bin ... 7.bin  a sixteenth of its size each
    small/                 500 files in 25 directories, with sizes as in a source repository
    many/                  100 directories of 50 files, 5,000 in all

A repository of 1,000 files, in one pack as is usual, lies beside them and is not served. It is
cloned onto the mounts with git.

Sizes and names are always the same; contents are random. The data that readers saw is compared with
these files.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

MIB = 1024 * 1024
BIG_NAMES = 5
EIGHT = 8
SMALL_FILES, SMALL_DIRECTORIES = 500, 25
SMALL_MEDIAN, SMALL_SPREAD, SMALL_MAX = 5000, 1.3, 256 * 1024
"""Median in bytes, sigma of the logarithm, maximum in bytes: 6 MiB in all, about as in repositories
of that size."""
MANY_DIRECTORIES, MANY_IN_EACH = 100, 50
REPOSITORY_FILES, REPOSITORY_DIRECTORIES = 1000, 60
LONG_AGO = 10**9
"""The mtime of the first small file, in seconds since 1970. The others follow, a minute apart."""
GIT = (
    *("env", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1"),
    *("git", "-c", "user.name=Benchmark", "-c", "user.email=benchmark@localhost"),
)
"""git without any user's settings."""
EXTENSIONS = (".py", ".c", ".h", ".md", ".json", ".txt", ".yaml", "")


@dataclass(frozen=True)
class Files:
    """The files below `root`; `size` is the big file's, in bytes."""

    root: Path
    size: int
    """The size of the big file in bytes."""
    repository: Path

    @property
    def big(self) -> list[str]:
        return [f"big/{number}.bin" for number in range(BIG_NAMES)]

    @property
    def eight(self) -> list[str]:
        return [f"eight/{number}.bin" for number in range(EIGHT)]

    small = "small"
    many = "many"

    def make(self) -> None:
        for name in ("big", "eight"):
            (self.root / name).mkdir(parents=True)
        _write(self.root / self.big[0], self.size)
        for name in self.big[1:]:
            os.link(self.root / self.big[0], self.root / name)
        for name in self.eight:
            _write(self.root / name, self.size // 16)
        _make_tree(self.root / self.small, SMALL_FILES, SMALL_DIRECTORIES)
        self._make_many()
        self.make_repository()

    def _make_many(self) -> None:
        for outer in range(MANY_DIRECTORIES):
            directory = self.root / self.many / f"directory{outer:03}"
            directory.mkdir(parents=True)
            for inner in range(MANY_IN_EACH):
                (directory / f"entry{inner:03}.dat").write_bytes(b"x" * (1 + (outer * inner) % 97))

    def make_repository(self) -> None:
        top = self.repository
        _make_tree(top, REPOSITORY_FILES, REPOSITORY_DIRECTORIES)
        for command in ("init -q -b main", "add .", "commit -q -m all", "repack -adq"):
            subprocess.run([*GIT, "-C", str(top), *command.split()], check=True)

    # --- expected content -------------------------------------------------------------------------

    def sizes_of_many(self) -> dict[str, int]:
        """Return sizes by path relative to the directory `many`."""
        top = self.root / self.many
        return {str(file.relative_to(top)): file.stat().st_size for file in top.glob("*/*")}

    def digest(self, name: str) -> str:
        """Return the file's hash as readers report it; this also loads the file into the server's
        page cache."""
        state = xxhash.xxh3_64()
        with (self.root / name).open("rb") as file:
            while piece := file.read(MIB):
                state.update(piece)
        return state.hexdigest()

    def digest_of_pieces(self, name: str, offsets: list[int], length: int) -> str:
        state = xxhash.xxh3_64()
        with (self.root / name).open("rb") as file:
            for offset in offsets:
                state.update(os.pread(file.fileno(), length, offset))
        return state.hexdigest()

    def warm(self) -> None:
        """Load everything into the server's page cache."""
        for file in self._all():
            with file.open("rb", buffering=0) as opened:
                while opened.read(MIB):
                    pass

    def _all(self) -> Iterator[Path]:
        yield from (self.root / name for name in (self.big[0], *self.eight))
        for top in (self.small, self.many):
            yield from (file for file in (self.root / top).rglob("*") if file.is_file())


def _make_tree(top: Path, files: int, count: int) -> None:
    """Make files with sizes as in a source repository, in `count` directories."""
    dice = random.Random(1)
    directories = [top]
    while len(directories) < count:
        parent = dice.choice(directories[:8])
        directories.append(parent / f"{dice.choice('abcdefgh')}{len(directories)}")
    for directory in directories:
        directory.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        size = int(dice.lognormvariate(0, SMALL_SPREAD) * SMALL_MEDIAN)
        file = directories[number % count] / f"file{number}{dice.choice(EXTENSIONS)}"
        _write(file, min(size, SMALL_MAX))
        os.utime(file, (LONG_AGO, LONG_AGO + 60 * number))


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, 16 * MIB):
            file.write(os.urandom(min(16 * MIB, size - start)))
