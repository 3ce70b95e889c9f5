"""The steps that write: each ends when the remote has all data, whatever the program was told
before.

The time of that is neither asked of the contender nor found by frequent polling: the server's disk
notes the time of the last change of each file and directory (st_ctime, to 4 ms), for contents,
names and attributes alike. So the step checks now and then whether everything is there, compares
it, and then reads off when it was complete. The checks cost the machine next to nothing.
"""

from __future__ import annotations

import filecmp
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcfs.remotes.s3.names import MARKER as DIRECTORY_MARKER
from scripts.benchmarks.files import GIT
from scripts.benchmarks.measure import TimedOut, WrongResult
from scripts.benchmarks.steps import Bench, Took
from scripts.benchmarks.writer import APPEND_BYTES, PIECE_BYTES, Writing, pieces

APPENDS = 10_000
LOOK_SECONDS = 0.2
PATIENCE_SECONDS = 30.0
"""Seconds for which a tree with all names and sizes that does not change may have other
contents."""
OWN_TO_A_CLONE = (".git/config", ".git/index")
"""Files whose content depends on the filesystem and on its inodes, and so does their size."""

Tree = dict[str, int | None]
"""Sizes by path, "." for the top itself; None for a directory."""
Differs = Callable[[Path], str]
"""Returns what is wrong with the server's files, or an empty string."""


def write(bench: Bench) -> Took:
    return _by_the_writer(bench, "whole", bench.files.size)


def append(bench: Bench) -> Took:
    return _by_the_writer(bench, "append", APPENDS * APPEND_BYTES)


def _by_the_writer(bench: Bench, what: str, size: int) -> Took:
    writing = bench.write(what, bench.at(bench.new), str(size))

    def differs(served: Path) -> str:
        with served.open("rb") as file:
            for piece in pieces(size, PIECE_BYTES[what]):
                if file.read(len(piece)) != piece:
                    return f"the file differs below {file.tell()}"
        return ""

    return _until_it_is_there(bench, writing, {".": size}, differs)


def copy_in(bench: Bench) -> Took:
    with _small_tree(bench) as source:
        writing = _run(bench, "cp", "-r", source, bench.at(bench.new))
        return _until_it_is_there(
            bench, writing, _tree(source), lambda served: _difference(source, served)
        )


def rsync_in(bench: Bench) -> Took:
    """Copy with rsync. It copies times too; an S3 server's disk does not have them."""
    with _small_tree(bench) as source:
        writing = _run(bench, "rsync", "-a", f"{source}/", bench.at(bench.new))

        def differs(served: Path) -> str:
            times = "" if bench.remote == "s3" else _difference_of_times(source, served)
            return _difference(source, served) or times

        return _until_it_is_there(bench, writing, _tree(source), differs)


def git_clone(bench: Bench) -> Took:
    clone = (*GIT, "clone", "--quiet", "--no-hardlinks", str(bench.files.repository))
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        expected = Path(scratch, "clone")
        subprocess.run([*clone, str(expected)], check=True)
        writing = _run(bench, *clone, bench.at(bench.new))

        def differs(served: Path) -> str:
            if _staged(served) != _staged(expected):
                return "git does not find the files in the clone's index"
            return _difference(expected, served, but=_is_own_to_a_clone)

        return _until_it_is_there(bench, writing, _tree(expected), differs)


def _is_own_to_a_clone(name: str) -> bool:
    return name in OWN_TO_A_CLONE or name.startswith(".git/logs/")  # logs have the time in them


def _staged(clone: Path) -> str:
    command = [*GIT, "-C", str(clone), "ls-files", "--stage"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@contextmanager
def _small_tree(bench: Bench) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        yield shutil.copytree(bench.files.root / bench.files.small, Path(scratch, "small"))


def _run(bench: Bench, *command: str | Path) -> Writing:
    started = time.monotonic()
    took, _ = bench.programs.run(*command)
    return Writing(started, started + took)


# --- the server's files ---------------------------------------------------------------------------


def _until_it_is_there(bench: Bench, writing: Writing, expected: Tree, differs: Differs) -> Took:
    """Wait until the server has everything. Raises TimedOut, or WrongResult where the content stays
    different."""
    last: tuple[int, str] | None = None
    since = time.monotonic()
    while True:
        with suppress(FileNotFoundError):  # something was renamed or removed while we looked
            found = _tree(bench.served)
            if bench.remote == "s3":
                expected, found = _objects(expected), _objects(found)
            if found == expected | _of_any_size(bench.served, expected):
                changed = _last_change(bench.served)
                if last is None or last[0] != changed:  # otherwise nothing changed
                    last, since = (changed, differs(bench.served)), time.monotonic()
                if not last[1] and _last_change(bench.served) == changed:
                    return _took(writing, changed)
                if time.monotonic() - since > PATIENCE_SECONDS:
                    raise WrongResult(f"what the server has is not what was written: {last[1]}")
        if time.monotonic() > bench.programs.deadline:
            bench.programs.abandon()
            raise TimedOut
        time.sleep(LOOK_SECONDS)


def _took(writing: Writing, changed: int) -> Took:
    arrived = changed / 1e9 - (time.time() - time.monotonic())
    ended = writing.ended - writing.started
    return Took(max(ended, arrived - writing.started), ended)


def _paths(top: Path) -> Iterator[Path]:
    yield top
    yield from top.rglob("*")


def _tree(top: Path) -> Tree:
    """Return sizes by path. Raises FileNotFoundError where the tree changes meanwhile, or is not
    there."""
    found = {str(path.relative_to(top)): path.lstat() for path in _paths(top)}
    return {
        path: None if stat.S_ISDIR(status.st_mode) else status.st_size
        for path, status in found.items()
    }


def _objects(tree: Tree) -> Tree:
    """Drop directories: S3 has none, and each program has its own stand-in for them."""
    return {
        path: size
        for path, size in tree.items()
        if size is not None and Path(path).name != DIRECTORY_MARKER
    }


def _of_any_size(top: Path, expected: Tree) -> Tree:
    """Return the files that must exist, with the sizes that they have."""
    return {path: (top / path).lstat().st_size for path in OWN_TO_A_CLONE if path in expected}


def _last_change(top: Path) -> int:
    """Return the time of the last change in nanoseconds since 1970."""
    return max(path.lstat().st_ctime_ns for path in _paths(top))


def _difference(expected: Path, served: Path, but: Callable[[str], bool] = lambda _: False) -> str:
    """Name the first file with other bytes, in the order of the directory; empty where all are
    equal."""
    for path in _paths(expected):
        name = str(path.relative_to(expected))
        if not path.is_file() or but(name) or filecmp.cmp(path, served / name, shallow=False):
            continue
        return f"{name} has other bytes"
    return ""


def _difference_of_times(expected: Path, served: Path) -> str:
    """Compare times to the second, which is all that SFTP has."""
    for path in _paths(expected):
        name = path.relative_to(expected)
        if path.is_file() and int(path.stat().st_mtime) != int((served / name).stat().st_mtime):
            return f"{name} has another time"
    return ""
