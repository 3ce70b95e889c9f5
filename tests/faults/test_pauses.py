"""Short outages are pauses, long ones errors in time: programs on real mounts.

The whole matrix runs with HPCFS_CUTS=N, each case N times; a part of it by itself.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import Mount, RealHome, errno_of, mounted, until

Starts = Callable[[str], Linked]
CLEAR = (errno.EHOSTUNREACH, errno.ETIMEDOUT)
ROUNDS = int(os.environ.get("HPCFS_CUTS", "0"))
KINDS = ("sftp", "s3-rclone")
CASES = [
    (kind, write, program, way, outage, seconds)
    for kind in KINDS
    for write in ("through", "back")
    for program in ("cp", "rsync")
    for way in ("in", "out")
    for outage in ("cut", "freeze")
    for seconds in (5.0, 20.0, 60.0)
]
SAMPLE = [
    ("sftp", "through", "cp", "in", "cut", 5.0),
    ("s3-rclone", "through", "cp", "in", "cut", 5.0),
    ("sftp", "through", "rsync", "out", "freeze", 5.0),
    ("s3-rclone", "through", "rsync", "out", "cut", 5.0),
    ("s3-rclone", "back", "rsync", "in", "freeze", 5.0),
    ("sftp", "back", "cp", "out", "cut", 5.0),
]
LARGE = 30_000_000


def make_tree(place: Path, seed: int) -> dict[str, bytes]:
    """Small files and a large one."""
    numbers = random.Random(seed)
    files = {f"d{n % 3}/f{n}": numbers.randbytes(numbers.randrange(60_000)) for n in range(24)}
    files["d1/large"] = numbers.randbytes(LARGE)
    for name, data in files.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return files


@contextmanager
def outage_after(far: Linked, count: int, how: str, seconds: float) -> Iterator[None]:
    """The link goes down once `count` bytes have passed, and comes back `seconds` later."""
    over = threading.Event()

    def mend() -> None:
        while not far.link.is_down:
            if over.wait(0.02):
                return
        over.wait(seconds)
        far.link.mend()

    mender = threading.Thread(target=mend)
    far.link.fail_after(count, "cut" if how == "cut" else "frozen")
    mender.start()
    try:
        yield
    finally:
        over.set()
        mender.join()


def copy(program: str, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = {
        "cp": ["cp", "-r", "--", f"{source}/.", str(target)],
        "rsync": ["rsync", "-a", f"{source}/", str(target)],
    }[program]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240, check=False
    )


def contents(place: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(place)): file.read_bytes()
        for file in place.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    ("kind", "write", "program", "way", "how", "seconds"), CASES if ROUNDS else SAMPLE
)
def test_programs_outlast_a_cut(
    kind: str,
    write: str,
    program: str,
    way: str,
    how: str,
    seconds: float,
    linked: Starts,
    real_home: RealHome,
    tmp_path: Path,
) -> None:
    """They finish by themselves, and what they copied is identical on the other side."""
    far = linked(kind)
    local = tmp_path / "local"
    local.mkdir()
    for number in range(max(ROUNDS, 1)):
        folder = f"round{number}"
        options = ["--write", write, "--patience", "15 min" if seconds > 30 else "30 s"]
        with mounted(real_home, {"ns": far.served}, *options, expected=(".",)) as mount:
            place = mount.path / "ns" / folder
            place.mkdir()
            source, target = (local / folder, place) if way == "in" else (place, local / folder)
            (local / folder).mkdir()
            if way == "in":
                files = make_tree(source, number)
            else:
                files = make_tree(tmp_path / f"made{number}", number)
                for name, data in files.items():
                    far.served.inside.write(f"{folder}/{name}", data)
            count = random.Random(number).randrange(LARGE // 4, LARGE)
            with outage_after(far, count, how, seconds):
                done = copy(program, source, target)
                assert (done.returncode, done.stderr) == (0, "")
                if write == "back" and way == "in":
                    synced = real_home.run("sync", mount.path)
                    assert synced.returncode == 0, synced.stderr
            if way == "out":
                assert contents(target) == files
            else:
                found = {name: far.served.inside.read(f"{folder}/{name}") for name in files}
                assert found == files


@pytest.mark.parametrize("kind", KINDS)
def test_a_suspended_machine_goes_on(
    kind: str, linked: Starts, real_home: RealHome, tmp_path: Path
) -> None:
    """All of a mount's processes are stopped for longer than the patience; the server has ended the
    connections meanwhile."""
    far = linked(kind)
    data = random.Random(5).randbytes(LARGE)
    far.served.inside.write("file", data)
    with mounted(real_home, {"ns": far.served}, "--patience", "5", expected=(".",)) as mount:
        pids = [mount.status.pid, *mount.transfer_processes()]
        far.link.fail_after(LARGE // 3, "frozen")
        with subprocess.Popen(["cp", str(mount.path / "ns" / "file"), str(tmp_path)]) as copying:
            until(lambda: far.link.is_down)
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                far.link.cut()
                time.sleep(8)  # the time itself is what is tested
            finally:
                far.link.mend()
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            assert copying.wait(60) == 0
        assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_run_waits_as_long_as_its_patience(
    kind: str, linked: Starts, real_home: RealHome, tmp_path: Path
) -> None:
    """15 min by default. Here 3 s, and not the 30 s of `hpcfs sync`."""
    far = linked(kind)
    Mount(real_home, {"ns": far.served.but(write="back", patience="3 s")}).write_config()
    listed, go = tmp_path / "listed", tmp_path / "go"
    script = (
        f'ls "$HPCFS_MOUNT"/ns; touch {listed}; while ! test -e {go}; do sleep 0.1; done; '
        'echo results > "$HPCFS_MOUNT"/ns/file'
    )
    command = real_home.command("run", "--", "sh", "-c", script)
    with subprocess.Popen(
        command, env=real_home.environment(), stderr=subprocess.PIPE, text=True
    ) as running:
        until(listed.exists)
        far.link.freeze()
        go.touch()
        began = time.monotonic()
        _, told = running.communicate(timeout=100)
        assert time.monotonic() - began < 25
        assert running.returncode == 1, told
        assert "hpcfs recover" in told
        far.link.mend()


def _calls(mount: Mount) -> dict[str, Callable[[], object]]:
    ns = mount.path / "ns"

    def write() -> None:
        fd = os.open(ns / "written", os.O_CREAT | os.O_WRONLY)
        try:
            os.write(fd, b"bytes")
        finally:
            os.close(fd)

    return {
        "read": lambda: (ns / "file").read_bytes(),
        "stat": lambda: os.stat(ns / "other"),
        "ls": lambda: os.listdir(ns / "dir"),
        "open": lambda: os.close(os.open(ns / "file2", os.O_RDONLY)),
        "write": write,
        "rename": lambda: os.rename(ns / "old", ns / "new"),
        "mkdir": lambda: os.mkdir(ns / "made"),
        "rm": lambda: os.unlink(ns / "gone"),
        "chmod": lambda: os.chmod(ns / "file3", 0o600),
    }


PATIENCE = 6.0
MARGIN = 3.0
"""For a loaded machine, and the answer's way through the kernel."""


@pytest.mark.parametrize("kind", KINDS)
def test_any_call_is_answered_within_the_patience(
    kind: str, linked: Starts, real_home: RealHome
) -> None:
    """On a link that stalls for good: all at once, each in a thread, and the next ones at once."""
    far = linked(kind)
    inside = far.served.inside
    for name in ("file", "file2", "file3", "other", "old", "gone", "dir/one"):
        inside.write(name, b"x" * 500_000)
    options = ("--patience", f"{PATIENCE:g}")
    with mounted(real_home, {"ns": far.served}, *options, expected=(".",)) as mount:
        os.stat(mount.path / "ns" / "file")
        far.link.freeze()
        took: dict[str, tuple[int | None, float]] = {}

        def measure(name: str, call: Callable[[], object]) -> None:
            began = time.monotonic()
            number = errno_of(call)
            took[name] = number, time.monotonic() - began

        for limit in (PATIENCE + MARGIN, MARGIN):
            took.clear()
            threads = [
                threading.Thread(target=measure, args=item) for item in _calls(mount).items()
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
            late = {name: at for name, (_, at) in took.items() if at > limit}
            assert not late, f"later than {limit:g} s: {late}"
            assert {name: number for name, (number, _) in took.items() if number not in CLEAR} == {}
        far.link.mend()
