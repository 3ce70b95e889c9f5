"""Worker processes that are killed in the middle of copies: programs finish, and nothing differs.

A part of the matrix runs by itself; HPCFS_WORKER_KILLS=N runs each case N times.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.faults.test_pauses import contents, copy, make_tree
from tests.support.mounts import Mount, RealHome, kill, mounted

Starts = Callable[[str], Linked]
ROUNDS = int(os.environ.get("HPCFS_WORKER_KILLS", "0"))
KINDS = ("sftp", "s3-rclone")
CASES = [
    (kind, write, program, way)
    for kind in KINDS
    for write in ("through", "back")
    for program in ("cp", "rsync")
    for way in ("in", "out")
]
SAMPLE = [
    ("sftp", "through", "rsync", "in"),
    ("s3-rclone", "through", "cp", "in"),
]
KILLS = 3
BYTES_BETWEEN = 12_000_000
"""At most, between two kills; a tree has some 30 MB."""
LOOK_SECONDS = 0.005


@contextmanager
def killing(mount: Mount, far: Linked, luck: random.Random) -> Iterator[list[int]]:
    """Kill the worker process as bytes pass; the list is of those that were."""
    over = threading.Event()
    killed: list[int] = []

    def work() -> None:
        before = far.link.relayed
        while len(killed) < KILLS:
            wanted = before + luck.randrange(BYTES_BETWEEN)
            while far.link.relayed < wanted:
                if over.wait(LOOK_SECONDS):
                    return
            for pid in mount.transfer_processes():
                with suppress(ProcessLookupError):
                    kill(pid)
                    killed.append(pid)
            before = far.link.relayed

    killer = threading.Thread(target=work)
    killer.start()
    try:
        yield killed
    finally:
        over.set()
        killer.join()


@pytest.mark.parametrize(("kind", "write", "program", "way"), CASES if ROUNDS else SAMPLE)
@pytest.mark.timeout(0 if ROUNDS else 300)
def test_copies_outlast_killed_workers(
    kind: str,
    write: str,
    program: str,
    way: str,
    linked: Starts,
    real_home: RealHome,
    tmp_path: Path,
) -> None:
    far = linked(kind)
    local = tmp_path / "local"
    killed = 0
    for number in range(max(ROUNDS, 1)):
        luck = random.Random(f"{kind} {write} {program} {way} {number}")
        folder = f"round{number}"
        with mounted(real_home, {"ns": far.served}, "--write", write, expected=(".",)) as mount:
            inside, outside = mount.path / "ns" / folder, local / folder
            if way == "in":
                files = make_tree(outside, number)
                inside.mkdir()
            else:
                files = make_tree(tmp_path / f"made{number}", number)
                for name, data in files.items():
                    far.served.inside.write(f"{folder}/{name}", data)
                outside.mkdir(parents=True)
            source, target = (outside, inside) if way == "in" else (inside, outside)
            with killing(mount, far, luck) as pids:
                done = copy(program, source, target)
                assert (done.returncode, done.stderr) == (0, ""), number
                if write == "back" and way == "in":
                    synced = real_home.run("sync", mount.path)
                    assert synced.returncode == 0, synced.stderr
            killed += len(pids)
            if way == "out":
                assert contents(target) == files, number
            else:
                found = {name: far.served.inside.read(f"{folder}/{name}") for name in files}
                assert found == files, number
            assert "Traceback" not in mount.log
    assert killed
