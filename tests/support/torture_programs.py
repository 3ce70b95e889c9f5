"""Programs that work on a mount under torture, each in folders of its own, and what they know.

A program goes in rounds. What a round was told is done goes into the ledger: contents by path, as
they must be there from then on. A round that fails is judged by the faults of its time; the program
then goes on in a new folder.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROUND_SECONDS = 240.0
"""The longest that a command may take: a few outages in a row, each shorter than the patience."""
SIZES = (0, 1, 100, 4096, 20_000, 65_537, 300_000)
LARGE = 3_000_000
_GIT = {
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{
        f"GIT_{who}_{what}": "t@example.org"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    },
}


class Failed(Exception):
    """Raised where a program ended with an error; says which."""


class Wrong(Exception):
    """Raised where a program saw what must not be, whatever befell it."""


def digest(data: bytes) -> str:
    return f"{len(data)} bytes {hashlib.blake2b(data, digest_size=8).hexdigest()}"


@dataclass
class Ledger:
    """`files` must be there: digests by path below the mount point. `checks` look at more at the
    end, and return what is wrong."""

    files: dict[str, str] = field(default_factory=dict)
    checks: list[Callable[[], str]] = field(default_factory=list)


@dataclass
class Calls:
    """How long single system calls took, in seconds without those of the daemon's suspension."""

    longest: float = 0.0
    what: str = ""
    under_way: dict[int, tuple[float, str]] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str, suspended: Callable[[], float]) -> Iterator[None]:
        began, stood = time.monotonic(), suspended()
        me = threading.get_ident()
        self.under_way[me] = began, what
        try:
            yield
        finally:
            del self.under_way[me]
            took = time.monotonic() - began - (suspended() - stood)
            if took > self.longest:
                self.longest, self.what = took, what


@dataclass
class Program:
    """One that goes on; subclasses say what a round is. `folder` is below the mount point."""

    mount_point: Path
    namespace: str
    local: Path
    luck: random.Random
    calls: Calls
    suspended: Callable[[], float]
    ledger: Ledger = field(default_factory=Ledger)
    rounds: Counter[str] = field(default_factory=Counter)
    generation: int = 0

    @property
    def name(self) -> str:
        return f"{type(self).__name__.lower()} on {self.namespace}"

    @property
    def folder(self) -> Path:
        return (
            self.mount_point / self.namespace / f"{type(self).__name__.lower()}-{self.generation}"
        )

    def begin(self) -> None:
        """Begin in a new folder."""
        self.generation += 1
        os.mkdir(self.folder)

    def round(self) -> None:
        """Do one round. Raises Failed, OSError or Wrong."""
        raise NotImplementedError

    def end(self) -> None:
        """Close what is open."""

    # --- helpers ---

    def command(self, *command: str | Path) -> str:
        limit = ROUND_SECONDS + self.suspended()
        try:
            done = subprocess.run(
                command, env={**os.environ, **_GIT}, stdin=subprocess.DEVNULL,
                capture_output=True, timeout=limit, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            told = " ".join(map(str, command))
            raise Wrong(f"{told} did not end within {limit:.0f} s") from error
        if done.returncode:
            told = done.stderr.decode(errors="replace").strip()[-300:]
            raise Failed(f"{' '.join(map(str, command))[:120]}: {done.returncode}, {told}")
        return done.stdout.decode(errors="replace")

    def acknowledged(self, path: Path, data: bytes) -> None:
        self.ledger.files[str(path.relative_to(self.mount_point))] = digest(data)

    def acknowledged_tree(self, source: Path, target: Path) -> None:
        for path, data in contents(source).items():
            self.acknowledged(target / path, data)

    def forget_tree(self, target: Path) -> None:
        below = f"{target.relative_to(self.mount_point)}/"
        for path in [one for one in self.ledger.files if one.startswith(below)]:
            del self.ledger.files[path]

    def fill(self, top: Path) -> None:
        """A tree of some files."""
        for number in range(self.luck.randrange(5, 25)):
            place = top / f"d{self.luck.randrange(4)}" / f"f{number}"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(self.content())

    def content(self) -> bytes:
        size = LARGE if self.luck.random() < 0.06 else self.luck.choice(SIZES)
        return self.luck.randbytes(size)


def contents(top: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


def difference(one: dict[str, bytes], other: dict[str, bytes]) -> str:
    """What two trees do not have in common; empty where they are the same."""
    odd = [path for path in one.keys() | other.keys() if one.get(path) != other.get(path)]
    told = [f"{path}: {_of(one.get(path))} became {_of(other.get(path))}" for path in sorted(odd)]
    return "; ".join(told[:3])


def _of(data: bytes | None) -> str:
    return "nothing" if data is None else digest(data)


class Cp(Program):
    """Copies a tree in, and out again, and removes some."""

    def round(self) -> None:
        source, back = self.local / "in", self.local / "out"
        for place in (source, back):
            shutil.rmtree(place, ignore_errors=True)
        self.fill(source)
        target = self.folder / f"tree{sum(self.rounds.values())}"
        self.command("cp", "-a", source, target)
        self.acknowledged_tree(source, target)
        self.command("cp", "-a", target, back)
        if found := difference(contents(source), contents(back)):
            raise Wrong(f"cp brought something else back: {found}")
        if self.luck.random() < 0.4:
            self.forget_tree(target)
            self.command("rm", "-r", target)


class Rsync(Program):
    """Keeps a tree in step with a local one, and compares both."""

    def begin(self) -> None:
        super().begin()
        shutil.rmtree(self.local / "tree", ignore_errors=True)
        self.fill(self.local / "tree")

    def round(self) -> None:
        source, target = self.local / "tree", self.folder / "tree"
        for path in self.luck.sample(sorted(source.rglob("f*")), k=3):
            path.write_bytes(self.content())
        if self.luck.random() < 0.3:
            next(iter(sorted(source.rglob("f*")))).unlink()
            self.fill(source)
        self.forget_tree(target)
        self.command("rsync", "-a", "--delete", f"{source}/", f"{target}/")
        self.acknowledged_tree(source, target)
        back = self.local / "back"
        shutil.rmtree(back, ignore_errors=True)
        self.command("rsync", "-a", f"{target}/", f"{back}/")
        if found := difference(contents(source), contents(back)):
            raise Wrong(f"rsync brought something else back: {found}")


class Git(Program):
    """Commits, and checks the repository now and then."""

    def begin(self) -> None:
        super().begin()
        self.command("git", "init", "-q", self.folder)
        self.ledger.checks.append(self._check(self.folder))
        self.commits: list[str] = []
        self.all_commits = getattr(self, "all_commits", {})
        self.all_commits[self.folder] = self.commits

    def round(self) -> None:
        for _ in range(3):
            (self.folder / f"file{self.luck.randrange(10)}").write_bytes(self.luck.randbytes(3000))
        git = ("git", "-C", self.folder)
        self.command(*git, "add", "-A")
        self.command(*git, "commit", "-q", "-m", "a round")
        self.commits.append(self.command(*git, "rev-parse", "HEAD").strip())
        if self.luck.random() < 0.2:
            self.command(*git, "fsck", "--full")

    def _check(self, folder: Path) -> Callable[[], str]:
        def check() -> str:
            try:
                for commit in self.all_commits[folder]:
                    self.command("git", "-C", folder, "cat-file", "-e", f"{commit}^{{tree}}")
                if self.all_commits[folder]:
                    self.command("git", "-C", folder, "fsck", "--full")
            except Failed as failed:
                return str(failed)
            return ""

        return check


class Sqlite(Program):
    """Inserts rows, one per transaction."""

    def begin(self) -> None:
        super().begin()
        self.file = self.folder / "rows.db"
        self.committed: list[int] = []
        with self._open() as base:
            base.execute("create table rows (number integer primary key, data blob)")
            base.commit()
        self.ledger.checks.append(self._check(self.file, self.committed))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.file, timeout=60)) as base:
                yield base
        except sqlite3.Error as error:
            raise Failed(f"sqlite3: {error}") from error

    def round(self) -> None:
        with self._open() as base:
            for _ in range(3):
                number = len(self.committed)
                base.execute("insert into rows values (?, ?)", (number, self.luck.randbytes(500)))
                base.commit()
                self.committed.append(number)

    @staticmethod
    def _check(file: Path, committed: list[int]) -> Callable[[], str]:
        def check() -> str:
            with closing(sqlite3.connect(file, timeout=60)) as base:
                (whole,) = base.execute("pragma integrity_check").fetchone()
                there = {number for (number,) in base.execute("select number from rows")}
            missing = sorted(set(committed) - there)
            return (
                "" if whole == "ok" and not missing else f"{file}: {whole}, {missing} are missing"
            )

        return check


class Append(Program):
    """Appends lines, and follows them as `tail -f` does."""

    follower: IO[bytes] | None = None

    def begin(self) -> None:
        self.end()
        super().begin()
        self.log = self.folder / "log"
        self.lines: list[bytes] = []
        self.log.write_bytes(b"")
        self.follower = self.log.open("rb", buffering=0)
        self.seen = b""
        self.ledger.checks.append(self._check(self.log, self.lines))

    def round(self) -> None:
        line = b"line %d %s\n" % (len(self.lines), self.luck.randbytes(20).hex().encode())
        with self.log.open("ab", buffering=0) as file:
            file.write(line)
            if self.luck.random() < 0.3:
                with self.calls.timed(f"fsync on {self.namespace}", self.suspended):
                    os.fsync(file.fileno())
        self.lines.append(line)
        assert self.follower
        whole = b"".join(self.lines)
        while more := self.follower.read(65_536):
            self.seen += more
        if not whole.startswith(self.seen):
            raise Wrong(f"tail -f of {self.log} saw what nobody wrote: {self.seen[-60:]!r}")
        time.sleep(0.05)

    def end(self) -> None:
        if self.follower is not None:
            with suppress(OSError):  # of a daemon that was killed
                self.follower.close()
            self.follower = None

    @staticmethod
    def _check(log: Path, lines: list[bytes]) -> Callable[[], str]:
        def check() -> str:
            there = log.read_bytes()
            return "" if there.startswith(b"".join(lines)) else f"{log} lost lines of {len(lines)}"

        return check


class Save(Program):
    """Saves as editors do: writes another file and renames it over; reads what is there."""

    def begin(self) -> None:
        super().begin()
        self.versions: set[bytes] = set()

    def round(self) -> None:
        target, temporary = self.folder / "text", self.folder / ".text.tmp"
        data = self.content()
        self.versions.add(data)
        with self.calls.timed(f"save on {self.namespace}", self.suspended):
            temporary.write_bytes(data)
        with self.calls.timed(f"rename on {self.namespace}", self.suspended):
            os.rename(temporary, target)
        self.acknowledged(target, data)
        found = target.read_bytes()
        if found not in self.versions:
            raise Wrong(f"{target} has {digest(found)}, which nobody wrote")
        if found != data:
            raise Wrong(f"{target} has an older version after the rename: {digest(found)}")


class Find(Program):
    """Walks all there is, and reads a file that never changes; each call is timed."""

    def begin(self) -> None:
        super().begin()
        self.steady = self.luck.randbytes(200_000)
        (self.folder / "steady").write_bytes(self.steady)
        self.acknowledged(self.folder / "steady", self.steady)

    def round(self) -> None:
        timed = self.calls.timed
        with timed(f"read on {self.namespace}", self.suspended):
            if (self.folder / "steady").read_bytes() != self.steady:
                raise Wrong("a file that never changes has changed")
        with timed(f"listdir on {self.namespace}", self.suspended):
            os.listdir(self.folder.parent)
        with timed(f"stat on {self.namespace}", self.suspended):
            os.stat(self.folder / "steady")
        with timed(f"missing on {self.namespace}", self.suspended):
            if os.path.lexists(self.folder / f"missing{self.luck.random()}"):
                raise Wrong("a name that nobody made is there")
        with timed(f"mkdir on {self.namespace}", self.suspended):
            os.mkdir(self.folder / "made")
            os.rmdir(self.folder / "made")
        time.sleep(0.2)


PROGRAMS: tuple[type[Program], ...] = (Cp, Rsync, Git, Sqlite, Append, Save, Find)
