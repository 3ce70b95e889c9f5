"""Trees of mixed files for tests, and what two trees must have in common.

The same seed gives the same tree: names that programs get wrong, sizes around the borders of
blocks and parts, symbolic links, modes and times.
"""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAMES = (
    b"plain",
    "ünïcödé".encode(),
    b"with space",
    b"quote'\"",
    b"-dash",
    b"%41percent",
    b"back\\slash",
    b"tab\t",
    "emoji😀".encode(),
    b"#hash?&+",
    b".hidden",
    b"trailing ",
    b"trail.",
    b"*star[a-z]",
    b"x" * 200,
)
NEWLINE = b"new\nline"  # moto's server can't store such keys
LATIN_1 = "lat\xe9in".encode("latin-1")  # no S3 key: those are UTF-8

SIZES = (0, 0, 1, 10, 1000, 4096, 65_536, 262_143, 262_144, 262_145, 500_000)
SMALL_SIZES = (0, 0, 1, 10, 100, 1000, 4096, 20_000)
TARGETS = (b"../x", b"/abs/olute", b"f1-plain", "ünï".encode(), b"a" * 300)
MODES = (0o644, 0o600, 0o755, 0o444, 0o640)
DIRECTORY_MODES = (0o755, 0o700, 0o750)
MIB = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """`count` files and links; `large` are the sizes of some more."""

    count: int
    names: tuple[bytes, ...] = NAMES
    sizes: tuple[int, ...] = SIZES
    large: tuple[int, ...] = (64 * MIB, 17 * MIB, 8 * MIB + 1, 5 * MIB)
    directories: int = 60


def make_tree(root: Path, recipe: Recipe, seed: int = 7) -> None:
    rnd = random.Random(seed)
    blob = rnd.randbytes(MIB)
    top = os.fsencode(root)
    os.mkdir(top)
    directories = [top]
    for number in range(recipe.directories):
        path = rnd.choice(directories) + b"/d%d-" % number + rnd.choice(recipe.names)
        if len(path) < 3000:
            os.mkdir(path)
            directories.append(path)
    sizes = [*recipe.large, *(rnd.choice(recipe.sizes) for _ in range(recipe.count))]
    for number, size in enumerate(sizes[: recipe.count]):
        path = rnd.choice(directories) + b"/f%d-" % number + rnd.choice(recipe.names)
        if number >= len(recipe.large) and rnd.random() < 0.05:
            os.symlink(rnd.choice(TARGETS), path)
        else:
            _make_file(path, size, blob, rnd)
        _set_time(path, rnd)
    for path in reversed(directories):
        os.chmod(path, rnd.choice(DIRECTORY_MODES))
        _set_time(path, rnd)


def _make_file(path: bytes, size: int, blob: bytes, rnd: random.Random) -> None:
    with open(path, "wb") as file:
        while size > 0:
            start = rnd.randrange(1000)
            size -= file.write(blob[start : start + size])
    os.chmod(path, rnd.choice(MODES))


def _set_time(path: bytes, rnd: random.Random) -> None:
    """Some before 2001, some with a fraction of a second."""
    fraction = rnd.choice((0, 0, rnd.randrange(10**9)))
    time_ns = rnd.randrange(10**8, 17 * 10**8) * 10**9 + fraction
    os.utime(path, ns=(time_ns, time_ns), follow_symlinks=False)


@dataclass(frozen=True)
class Facts:
    """What must survive a copy; of a link its target, of a file a digest."""

    type: int
    mode: int
    mtime: int
    content: bytes


def facts_of(root: Path) -> dict[bytes, Facts]:
    """Of all below `root`, by relative path; times in whole seconds, which SFTP keeps."""
    top = os.fsencode(root)
    return {os.path.relpath(path, top): _facts(path) for path in _walk(top)}


def _walk(path: bytes) -> Iterator[bytes]:
    yield path
    with os.scandir(path) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path)
        else:
            yield entry.path


def _facts(path: bytes) -> Facts:
    found = os.lstat(path)
    content = b""
    if stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            content = hashlib.file_digest(file, "blake2b").digest()
    kind, mode = stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode)
    if stat.S_ISLNK(found.st_mode):
        mode = 0  # not kept by every remote, and of no use
    return Facts(kind, mode, int(found.st_mtime_ns // 10**9), content)


def differences(one: dict[bytes, Facts], other: dict[bytes, Facts]) -> list[str]:
    found = [f"missing: {path!r}" for path in sorted(one.keys() - other.keys())]
    found += [f"not expected: {path!r}" for path in sorted(other.keys() - one.keys())]
    for path in sorted(one.keys() & other.keys()):
        if one[path] != other[path]:
            found.append(f"{path!r}: {one[path]} became {other[path]}")
    return found
