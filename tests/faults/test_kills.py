"""Programs write, rename and remove; the daemon, its transfer process or both are killed before one
of their steps; and then there is exactly what was acknowledged.

Each point has a folder of its own and a story, see support/promises.py for what must hold. The
mount, its cache and its journal live on from point to point, as a user's would. A short run takes
the middle step of each kind; HPCFS_FULL=1 in the environment has all stories and victims, and up to
60 steps of each kind (hours), HPCFS_KILLS=10 fewer of them. HPCFS_RANDOM_KILLS=250 makes so many
kills in random stories for each kind of remote and each mode, HPCFS_KILLS_SEED=x other ones. Such
long runs need `pytest --timeout 0`.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hpcfs.control import control
from hpcfs.control.control import ControlRequest
from hpcfs.model.errors import SetupError
from hpcfs.system import paths
from tests.support import random_stories
from tests.support.mounts import (
    Mount,
    Served,
    errno_of,
    make_real_home,
    mounted,
    served_by_s3,
    served_by_ssh,
    until,
)
from tests.support.promises import Program
from tests.support.s3 import S3Server, moto_s3
from tests.support.sshd import ssh_server
from tests.support.steps import DAEMON, Steps, is_gone, spread

FULL = os.environ.get("HPCFS_FULL") == "1"
MOST = int(os.environ.get("HPCFS_KILLS", "60" if FULL else "1"))
MIB = 1 << 20
RANDOM = int(os.environ.get("HPCFS_RANDOM_KILLS", "0"))
"""Of each kind of remote and each mode."""
SEED = os.environ.get("HPCFS_KILLS_SEED", "kills")
TRANSIENT = "the transfer process of this site ended"
"""Is tried again a second later."""
_folders = itertools.count()


def content(seed: int, size: int) -> bytes:
    """Without zeros, which are what lost bytes look like."""
    return random.Random(seed).randbytes(size).replace(b"\0", b"\1")


def pieces(data: bytes, length: int) -> list[tuple[int, bytes]]:
    return [(at, data[at : at + length]) for at in range(0, len(data), length)]


# --- stories --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    seeds: dict[str, bytes]
    tell: Callable[[Program], None]


def _small(program: Program) -> None:
    program.make_directory("d")
    program.write("d/a", pieces(content(1, 200_001), 70_000))
    program.write("old", [(100_000, content(2, 9_000)), (250_000, content(3, 20_000))], os.O_CREAT)
    log = len(program.account.files["log"])
    program.write("log", [(log, b"one line\n"), (log + 9, b"two lines\n")], fsync_after=1, flags=0)
    program.write("d/.b.tmp", pieces(content(4, 90_000), 40_000))
    program.set_attributes("d/.b.tmp", 0o600, 1_234_567_890)
    program.rename("d/.b.tmp", "d/b")
    program.write(".old2.tmp", [(0, content(5, 70_000))])
    program.set_attributes(".old2.tmp", 0o644, 1_034_567_890)
    program.rename(".old2.tmp", "old2")
    program.write("over", [(0, content(6, 50_000))])
    program.truncate("cut", 5_000)
    program.truncate("d/a", 100_000)


def _names(program: Program) -> None:
    program.write("short-lived", [(0, content(1, 3_000))])
    program.unlink("short-lived")
    program.unlink("gone")
    program.rename("r1", "r2")
    program.rename("r3", "r4")
    program.set_attributes("m", 0o600, 1_111_111_111)
    program.write("tree/p", [(0, content(2, 70_000))])
    program.rename_directory("tree", "tree2")
    program.write("tree2/x", [(0, content(3, 4_000))])
    program.make_directory("e")
    program.remove_directory("e")
    program.write("r2", [(0, content(4, 5_000))])
    program.rename("r2", "r4")


def _large(program: Program) -> None:
    program.write("stream", pieces(content(1, 50 * MIB + 77), MIB))
    program.write("big", [(7 * MIB + 5, content(2, MIB))], os.O_CREAT)
    program.rename("big", "big2")


def _edges(program: Program) -> None:
    """Nothing but names, attributes and sizes of 0."""
    program.write("new", [])
    program.write("emptied", [])
    program.write("filled", [(0, content(1, 5_000))])
    program.set_attributes("attributes", 0o600, 1_111_111_111)
    program.set_attributes("new", 0o640, 1_222_222_222)
    program.rename("renamed", "renamed2")
    program.rename("new", "taken")
    program.write("cut", [(10, b"more")], os.O_CREAT)
    program.truncate("cut", 0)
    time.sleep(0.4)  # uploads begin, and some end
    program.write("taken", [(0, content(2, 3_000))])
    program.write("taken", [])
    program.rename("taken", "attributes")
    program.write("filled", [])
    program.set_attributes("filled", 0o600, 1_333_333_333)
    program.write("emptied", [(0, b"again")])
    program.unlink("emptied")
    program.write("emptied", [])


STORIES = {
    "small": Story(
        {name: content(n, 300_000) for n, name in enumerate(("old", "log", "old2", "over", "cut"))},
        _small,
    ),
    "names": Story(
        {
            name: content(n, 10_000)
            for n, name in enumerate(
                ("gone", "r1", "r3", "r4", "m", "tree/1", "tree/2", "tree/3", "tree/s/4")
            )
        },
        _names,
    ),
    "edges": Story(
        {
            **{name: content(n, 9_000) for n, name in enumerate(("emptied", "attributes", "cut"))},
            "filled": b"",
            "renamed": b"",
            "taken": content(4, 70_000),
        },
        _edges,
    ),
    "large": Story({"big": content(9, 20 * MIB)}, _large),
}


def story_of(name: str) -> Story:
    """By its name; "random-7" is the random story with that seed."""
    if name not in STORIES:
        seed = int(name.removeprefix("random-"))
        return Story(random_stories.seeds_of(seed), partial(random_stories.tell, seed))
    return STORIES[name]


# --- the places -----------------------------------------------------------------------------------


class Folder:
    """What a server has below a folder, without hpcfs."""

    def __init__(self, served: Served, client: Any) -> None:
        self._served = served
        self._client = client

    def fill(self, top: str, seeds: dict[str, bytes]) -> None:
        for path, data in seeds.items():
            self._put(f"{top}/{path}", data)

    def _put(self, path: str, data: bytes) -> None:
        if self._client is None:
            self._served.inside.write(path, data)
        else:
            self._client.put_object(**self._place(path), Body=data)

    def _place(self, path: str) -> dict[str, str]:
        keys = self._served.keys
        return {"Bucket": str(keys["bucket"]), "Key": f"{keys['prefix']}/{path}"}

    def look(self, top: str) -> dict[str, bytes]:
        if self._client is None:
            root = Path(str(self._served.keys["path"])) / top
            files = [place for place in root.rglob("*") if place.is_file()]
            return {str(place.relative_to(root)): place.read_bytes() for place in files}
        place = self._place(f"{top}/")
        found = self._client.list_objects_v2(Bucket=place["Bucket"], Prefix=place["Key"])
        keys = [one["Key"] for one in found.get("Contents", []) if not one["Key"].endswith("/")]
        return {key.removeprefix(place["Key"]): self._get(place["Bucket"], key) for key in keys}

    def _get(self, bucket: str, key: str) -> bytes:
        return bytes(self._client.get_object(Bucket=bucket, Key=key)["Body"].read())


@dataclass(frozen=True)
class Point:
    """Where to kill: before the `nth` step of a kind; `victim` is "daemon", "transfer" or "both",
    which is the daemon's step and the death of its transfer process with it."""

    story: str
    victim: str
    kind: str
    nth: int

    def __str__(self) -> str:
        return f"{self.story}-{self.victim}-{self.kind}-{self.nth}"


Second = tuple[str | None, int]
"""The step (kind, nth) before which the next daemon is killed too; no kind: it lives."""


@dataclass
class Place:
    mount: Mount
    folder: Folder
    steps: Steps
    mode: str
    kind: str
    recovery: dict[str, int] = field(default_factory=dict)
    """The steps of the last daemon that took up what another one left."""

    # --- running a story --------------------------------------------------------------------------

    def begin(self, story: str) -> Program:
        name = f"p{next(_folders)}"
        told = story_of(story)
        self.folder.fill(name, told.seeds)
        top = self.mount.path / "ns" / name
        until(lambda: errno_of(os.stat, top) is None and self.mount.transfer_processes())
        return Program(top, told.seeds, back=self.mode == "back", s3=self.kind != "sftp")

    def count(self, story: str, victim: str) -> dict[str, int]:
        """The steps of an undisturbed run."""
        program = self.begin(story)
        self.steps.watch(self._pid(victim))
        story_of(story).tell(program)
        self.sync()
        counts = self.steps.stop()
        self.check(program, set())
        return counts

    def _pid(self, victim: str) -> int:
        return self.mount.transfer_processes()[0] if victim == "transfer" else self.mount.status.pid

    def kill(self, point: Point, second: Second | None = None) -> bool:
        """Whether the point was reached; then all is checked."""
        program = self.begin(point.story)
        also = self._pid("transfer") if point.victim == "both" else 0
        daemon = self._pid("daemon")
        pid = self._pid(point.victim)
        self.steps.watch(pid, point.kind, point.nth, also)
        try:
            story_of(point.story).tell(program)
            self.sync()
        except OSError:
            assert self.steps.has_killed, "a call failed though nothing was killed"
        except SetupError:
            assert self.steps.has_killed, "hpcfs sync failed though nothing was killed"
        self.steps.stop()
        if not self.steps.has_killed:
            self.check(program, set())
            return False
        until(lambda: is_gone(pid))
        lines = program.account.problems_on_remote(self.folder.look(program.top.name))
        assert not lines, _report("on the remote, before anything else", program, lines)
        if point.victim != "transfer" and not (second and self._outlives(second)):
            self.mount.mount()
        stuck = self.retry() if point.victim == "transfer" else set()
        assert self.mount.status.pid != daemon or point.victim == "transfer"
        self.check(program, stuck)
        return True

    def _outlives(self, second: Second) -> bool:
        """Whether a daemon that takes up what the killed one left did so until all was uploaded."""
        self.steps.watch(DAEMON, *second)
        done = self.mount.home.run("mount", self.mount.path)
        try:
            if not done.returncode:
                self.sync()
        except SetupError:
            assert self.steps.has_killed, "hpcfs sync failed though nothing was killed"
        self.recovery = self.steps.stop()
        if not self.steps.has_killed:
            assert not done.returncode, done.stderr
            return True
        until(lambda: is_gone(self.steps.killed))
        return self.mount.is_mounted and self.is_alive()  # the command that waits for it was killed

    def check(self, program: Program, retried: set[str]) -> None:
        """`retried` were kept, so that the mount does not show them before they are brought."""
        pending = self.mount.status.pending
        stuck = [one for one in pending if one.is_stuck and TRANSIENT not in one.reason]
        stuck = [one for one in stuck if one.path not in retried]
        assert not stuck, _report("stuck", program, [f"{o.path}: {o.reason}" for o in stuck])
        if not retried:  # before it went up, the mount shows what it will be
            seen = program.look()
            lines = program.problems(seen)
            assert not lines, _report("as the mount shows it", program, lines)
        self.sync()
        again = program.look()
        if not retried:
            assert again == seen, _report("after it was uploaded", program, program.problems(again))
        lines = program.problems(again)
        assert not lines, _report("after it was uploaded", program, lines)
        there = self.folder.look(program.top.name)
        program.account.files, program.account.doubt = again, None
        lines = program.account.problems_of(there)
        assert not lines, _report("on the remote, at last", program, lines)
        assert not self.mount.status.pending
        assert not self.mount.kept

    def sync(self) -> None:
        control.work(self._socket, ControlRequest("sync"), lambda _: None, 60)

    def retry(self) -> set[str]:
        """What `close` could not bring while there was no transfer process; in `back` mode that is
        tried again without being told."""
        until(lambda: _is_quiet(self.mount))
        stuck = {one.path for one in self.mount.status.pending if one.state == "kept"}
        assert not stuck or self.mode == "through", stuck
        if stuck:
            control.work(self._socket, ControlRequest("retry"), lambda _: None, 60)
        return stuck

    def is_alive(self) -> bool:
        return errno_of(os.statvfs, self.mount.path) is None

    @property
    def _socket(self) -> Path:
        return paths.find_socket(self.mount.path, self.mount.environ)


def _is_quiet(mount: Mount) -> bool:
    """Listing it starts a transfer process, a second after the last one was started."""
    return mount.namespace("ns").state == "connected" or not errno_of(os.listdir, mount.path / "ns")


def _report(when: str, program: Program, lines: list[str]) -> str:
    doubt = program.account.doubt
    under_way = f"under way: {doubt.what}" if doubt else "nothing was under way"
    return "\n".join([f"{when}; {under_way}", *lines])


@contextmanager
def place(directory: Path, kind: str, mode: str) -> Iterator[Place]:
    steps = Steps(directory / "steps")
    home = make_real_home(directory / "home")
    home.environ.update(steps.environ)
    expected = [r" (WARNING|ERROR) "]
    with ssh_server(directory / "sshd") if kind == "sftp" else moto_s3() as server:
        if isinstance(server, S3Server):
            with server.client() as client:
                served = served_by_s3(kind, server).but(write=mode)
                with mounted(home, {"ns": served}, expected=expected) as mount:
                    yield Place(mount, Folder(served, client), steps, mode, kind)
        else:
            served = served_by_ssh(server).but(write=mode)
            with mounted(home, {"ns": served}, expected=expected) as mount:
                yield Place(mount, Folder(served, None), steps, mode, kind)


# --- tests ----------------------------------------------------------------------------------------


MODES = ("through", "back")
VICTIMS = ("daemon", "transfer", "both")
CASES = [(story, victim, mode) for story in STORIES for victim in VICTIMS for mode in MODES]
SOME_CASES = [
    *[("small", "daemon", mode) for mode in MODES],
    *[("names", "transfer", mode) for mode in MODES],
    ("edges", "both", "back"),
]


@pytest.mark.parametrize("kind", ["sftp", "s3-moto"])
@pytest.mark.parametrize(("story", "victim", "mode"), CASES if FULL else SOME_CASES)
def test_what_was_acknowledged_outlives_kills(
    story: str, victim: str, kind: str, mode: str, tmp_path: Path
) -> None:
    with place(tmp_path, kind, mode) as here:
        counts = here.count(story, victim)
        print(counts)
        points = [Point(story, victim, kind, nth) for kind, nth in spread(counts, MOST)]
        tries = {str(point): partial(here.kill, point) for point in points}
        assert try_all(here, tries) > len(tries) / 2


@pytest.mark.parametrize("mode", ["through", "back"])
@pytest.mark.parametrize("kind", ["sftp", "s3-moto"])
@pytest.mark.parametrize("story", STORIES if FULL else ["small"])
def test_so_it_does_when_the_next_daemon_is_killed_too(
    story: str, kind: str, mode: str, tmp_path: Path
) -> None:
    with place(tmp_path, kind, mode) as here:
        steps = {"journal": here.count(story, "daemon")["journal"]}
        first = next(
            point
            for point in (Point(story, "both", *step) for step in spread(steps, 8))
            if here.kill(point, second=(None, 0)) and here.recovery["journal"]
        )
        print(first, here.recovery)
        kinds = set(here.recovery) - {"tell"} if FULL else {"journal"}
        counts = {kind: here.recovery[kind] for kind in sorted(kinds)}
        tries = {
            f"{first}, then {second}": partial(here.kill, first, second=second)
            for second in spread(counts, MOST)
        }
        assert try_all(here, tries) > len(tries) / 2


@pytest.mark.parametrize("mode", ["back", "through"] if FULL or RANDOM else ["back"])
@pytest.mark.parametrize("kind", ["sftp", "s3-moto"])
def test_random_changes_outlive_kills(kind: str, mode: str, tmp_path: Path) -> None:
    """The daemon is killed before any step of a random story, and in every other one the next
    daemon too, while it takes up what was left."""
    draw = random.Random(SEED)
    with place(tmp_path, kind, mode) as here:
        counts = here.count("random-0", "daemon")
        tries: dict[str, Callable[[], bool]] = {}
        for number in range(RANDOM or 2):
            step = draw.choice([one for one, count in counts.items() if count])
            victim = draw.choice(("daemon", "both"))
            point = Point(f"random-{draw.randrange(10**9)}", victim, step, 0)
            point = replace(point, nth=1 + draw.randrange(-(-counts[step] * 2 // 3)))
            second = (draw.choice(("journal", "cache", "sync")), draw.randrange(1, 12))
            again = second if number % 2 else None
            tries[f"{point}, then {again}"] = partial(here.kill, point, second=again)
        assert try_all(here, tries), "no kill took place"


def try_all(here: Place, tries: Mapping[str, Callable[[], bool]]) -> int:
    """How many of the points were reached; none may have a problem."""
    failed: list[str] = []
    passed = missed = 0
    for name, attempt in tries.items():
        try:
            if attempt():
                passed += 1
            else:
                missed += 1
            if passed % 50 == 0:
                print(f"{passed} points passed so far", flush=True)
        except (AssertionError, OSError) as error:
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:3000]}")
            print("FAILED", failed[-1], here.mount.log[-3000:], flush=True)
            if len(failed) > 5:
                break
            here.steps.stop()
            if not here.is_alive():
                here.mount.mount()
    print(f"{passed} points passed, {missed} were not reached")
    assert not failed, "\n\n".join(failed)
    return passed
