"""Files that a job on the cluster changes while programs here read and append to them: what the
kernel believes of a file's size for a second must not show."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support.mounts import (
    WRITE_MODES,
    Inside,
    Mount,
    in_write_mode,
    make_real_home,
    mounted,
    run,
)

KINDS = ("sftp", "s3-moto")
POLLS = 100


@pytest.fixture(scope="module")
def mounts(
    servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Mount]]:
    """One for each mode."""
    with ExitStack() as stack:
        made = {}
        for mode in WRITE_MODES:
            home = make_real_home(tmp_path_factory.mktemp("shared") / "home")
            served = {kind: in_write_mode(servers.serve(kind), mode) for kind in KINDS}
            made[mode] = stack.enter_context(mounted(home, served))
        yield made


@dataclass
class Shared:
    """One namespace."""

    mount: Mount
    name: str

    @property
    def path(self) -> Path:
        return self.mount.path / self.name

    @property
    def inside(self) -> Inside:
        return self.mount.namespaces[self.name].inside

    @property
    def on_disk(self) -> Path:
        return Path(str(self.mount.namespaces[self.name].keys["path"]))

    def sync(self) -> None:
        run(*self.mount.home.command("sync", self.mount.path), **self.mount.environ)


def _shared(request: pytest.FixtureRequest, mounts: dict[str, Mount]) -> Iterator[Shared]:
    kind, mode = request.param
    yield Shared(mounts[mode], kind)
    mounts[mode].check_log()


@pytest.fixture(params=itertools.product(KINDS, WRITE_MODES), ids="-".join)
def shared(request: pytest.FixtureRequest, mounts: dict[str, Mount]) -> Iterator[Shared]:
    yield from _shared(request, mounts)


@pytest.fixture(params=itertools.product(["sftp"], WRITE_MODES), ids="-".join)
def shared_sftp(request: pytest.FixtureRequest, mounts: dict[str, Mount]) -> Iterator[Shared]:
    yield from _shared(request, mounts)


def _mapped(path: Path) -> bytes:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return bytes(mapped)


def _copied(path: Path) -> bytes:
    copy = path.parent.parent.parent / "copy"  # on the local disk
    run("cp", path, copy)
    return copy.read_bytes()


@pytest.mark.parametrize("read", [Path.read_bytes, _mapped, _copied])
def test_what_was_replaced_after_a_look_is_read_whole(
    shared: Shared, read: Callable[[Path], bytes]
) -> None:
    file = shared.path / "f"
    for old, new in [(b"old " * 700, b"new " * 2000), (b"old " * 50_000, b"new"), (b"", b"new")]:
        shared.inside.write("f", old)
        os.listdir(shared.path)
        assert file.read_bytes() == old if old else True
        os.stat(file)
        shared.inside.write("f", new)
        _let_open_ask()
        assert read(file) == new
        assert file.stat().st_size == len(new)


def _let_open_ask() -> None:
    """open(2) believes what the path walk asked less than 0.1 s before."""
    threading.Event().wait(0.15)


def test_a_file_that_is_replaced_all_the_time_is_never_cut(shared: Shared) -> None:
    """A job's state as JSON, each version in one step."""
    stop = threading.Event()

    def body(number: int) -> bytes:
        return json.dumps([number, "x" * (number * 7919 % 30_000), number]).encode()

    def replace() -> None:
        number = 0
        while not stop.wait(0.01):
            number += 1
            if shared.name == "sftp":
                shared.inside.write("next", body(number))
                (shared.on_disk / "next").rename(shared.on_disk / "state.json")
            else:
                shared.inside.write("state.json", body(number))

    shared.inside.write("state.json", body(0))
    job = threading.Thread(target=replace)
    job.start()
    versions = set()
    try:
        for _ in range(POLLS):
            first, _, last = json.loads((shared.path / "state.json").read_bytes())
            assert first == last
            versions.add(first)
            stop.wait(0.01)
    finally:
        stop.set()
        job.join()
    assert len(versions) > 3


@contextmanager
def _tail(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["tail", "-f", "-n", "+1", path], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside-tail"])
def test_a_line_lands_after_what_the_job_wrote(shared: Shared, beside: bool) -> None:
    log, line = shared.path / "log", b"from here\n"
    before = b"".join(b"%d\n" % number for number in range(300))
    after = b"".join(b"%d\n" % number for number in range(600))
    shared.inside.write("log", before)
    os.listdir(shared.path)
    assert log.read_bytes() == before
    with _tail(log) if beside else open(os.devnull):
        os.stat(log)
        shared.inside.write("log", after)
        _let_open_ask()
        run("sh", "-c", "echo from here >> log", cwd=shared.path)
        shared.sync()
        assert shared.inside.read("log") == after + line
    assert log.read_bytes() == after + line


def test_a_line_after_copytruncate_has_no_zeros_before_it(shared: Shared) -> None:
    shared.inside.write("log", b"a line\n" * 500)
    os.listdir(shared.path)
    os.stat(shared.path / "log")
    shared.inside.write("log", b"")
    _let_open_ask()
    run("sh", "-c", "echo from here >> log", cwd=shared.path)
    shared.sync()
    assert shared.inside.read("log") == b"from here\n"


def test_two_who_append_lose_no_line(shared_sftp: Shared) -> None:
    """By one descriptor here that stays open, and by one for each line."""
    (shared_sftp.on_disk / "both").write_bytes(b"")
    script = "i=0; while [ $i -lt 3000 ]; do echo theirs $i; i=$((i+1)); sleep 0.001; done"
    count = 40
    with (
        (shared_sftp.on_disk / "both").open("ab") as log,
        subprocess.Popen(["sh", "-c", script], stdout=log) as job,
    ):
        with (shared_sftp.path / "both").open("ab", buffering=0) as kept:
            for number in range(count):
                kept.write(b"kept %d\n" % number)
                if number % 10 == 9:
                    os.fsync(kept.fileno())
                with (shared_sftp.path / "both").open("ab", buffering=0) as opened:
                    opened.write(b"ours %d\n" % number)
        job.terminate()
    shared_sftp.sync()
    found = (shared_sftp.on_disk / "both").read_bytes()
    assert b"\0" not in found
    lines = found.splitlines()
    for name in (b"kept", b"ours"):
        mine = [line for line in lines if line.startswith(name)]
        assert mine == [b"%s %d" % (name, number) for number in range(count)]
    theirs = [line for line in lines if line.startswith(b"theirs")]
    assert theirs == [b"theirs %d" % number for number in range(len(theirs))]
    assert len(theirs) + 2 * count == len(lines)
    assert (shared_sftp.path / "both").read_bytes() == found


def test_what_the_job_just_made_is_there(shared: Shared) -> None:
    """For programs that asked for many names before, and for a moment old listing lacks it."""
    os.mkdir(shared.path / "made")
    shared.inside.write("made/first", b"x")
    for number in range(20):
        assert not (shared.path / "made" / f"missing-{number}").exists()
        (shared.path / "made" / f"ours-{number}").touch()
    for number, flags in enumerate([os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_TRUNC]):
        os.listdir(shared.path / "made")
        made = shared.path / "made" / f"new-{number}"
        assert not made.exists()
        shared.inside.write(f"made/new-{number}", b"from the job")
        _let_open_ask()
        os.close(os.open(made, flags))
        assert made.stat().st_size == (0 if flags & os.O_TRUNC else 12)
        made.rename(made.with_name(f"renamed-{number}"))
