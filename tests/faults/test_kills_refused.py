"""Programs write to a remote that is full; what it refuses is kept, and brought when there is room
again and the user tries again. The daemon, its transfer process or both are killed before one of
their steps of all that; then every file of which close(2) told that it was refused, or, in `back`
mode, that it was taken, comes to the remote in the end.

As in test_kills.py, HPCFS_FULL=1 tries many steps, HPCFS_KILLS of each kind.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hpcfs.control import control
from hpcfs.control.control import ControlRequest
from hpcfs.model.errors import SetupError
from hpcfs.system import paths
from tests.support.mounts import (
    Mount,
    errno_of,
    make_real_home,
    mounted,
    served_by_ssh,
    until,
)
from tests.support.promises import TEMPORARY
from tests.support.sshd import ssh_server
from tests.support.steps import Steps, is_gone, spread

FULL = os.environ.get("HPCFS_FULL") == "1"
MOST = int(os.environ.get("HPCFS_KILLS", "8" if FULL else "1"))
OLD, NEW, MORE = (random.Random(n).randbytes(300_000).replace(b"\0", b"\1") for n in range(3))
BALLAST = "ballast"
_folders = itertools.count()


@dataclass
class FullServer:
    """`disk` is a small one, which the server serves."""

    mount: Mount
    steps: Steps
    disk: Path
    mode: str
    folder: str = ""
    told: dict[str, bytes] = field(default_factory=dict)
    """What close(2) returned for, and whoever wrote it may rely on."""

    # --- the server's disk ------------------------------------------------------------------------

    def fill(self) -> None:
        with (self.disk / BALLAST).open("wb", buffering=0) as file:
            while errno_of(file.write, bytes(1 << 16)) is None:
                pass

    def free(self) -> None:
        (self.disk / BALLAST).unlink(missing_ok=True)

    def there(self) -> dict[str, bytes]:
        found = (self.disk / self.folder).iterdir()
        return {one.name: one.read_bytes() for one in found if not TEMPORARY.search(one.name)}

    # --- the story --------------------------------------------------------------------------------

    def begin(self) -> None:
        self.folder = f"p{next(_folders)}"
        (self.disk / self.folder).mkdir()
        (self.disk / self.folder / "old").write_bytes(OLD)
        self.told = {"old": OLD}
        until(lambda: errno_of(os.stat, self.top / "old") is None)
        self.fill()

    @property
    def top(self) -> Path:
        return self.mount.path / "ns" / self.folder

    def tell(self) -> None:
        """Raises OSError or SetupError when something was killed."""
        self._write("new", NEW, NEW)
        self._write("old", MORE, OLD + MORE)
        until(lambda: all(one.is_stuck for one in self.mount.status.pending))
        self.free()
        until(lambda: self.steps.has_killed or self._is_all_brought(), 30)

    def _write(self, name: str, data: bytes, final: bytes) -> None:
        self.told.pop(name, None)
        file = os.open(self.top / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, data)
        finally:
            number = errno_of(os.close, file)
        if number is None and self.mode == "through":
            raise AssertionError("there was no room, and close did not say so")
        if number not in (None, errno.ENOSPC):
            raise OSError(number, "the transfer process or the daemon was killed")
        self.told[name] = final

    def work(self, command: str) -> None:
        socket = paths.find_socket(self.mount.path, self.mount.environ)
        control.work(socket, ControlRequest(command), lambda _: None, 60)

    # --- kills ------------------------------------------------------------------------------------

    def count(self, victim: str) -> dict[str, int]:
        self.begin()
        self.steps.watch(self._pid(victim))
        self.tell()
        counts = self.steps.stop()
        self.check()
        return counts

    def _pid(self, victim: str) -> int:
        return self.mount.transfer_processes()[0] if victim == "transfer" else self.mount.status.pid

    def kill(self, victim: str, kind: str, nth: int) -> None:
        self.begin()
        also = self._pid("transfer") if victim == "both" else 0
        pid = self._pid(victim)
        self.steps.watch(pid, kind, nth, also)
        try:
            self.tell()
        except (OSError, SetupError):
            assert self.steps.has_killed, "a call failed though nothing was killed"
        self.steps.stop()
        if self.steps.has_killed:
            until(lambda: is_gone(pid))
        if self.steps.has_killed and victim != "transfer":
            self.mount.mount()
        self.free()
        self.check()

    def check(self) -> None:
        until(self._is_all_brought, 30)
        found = self.there()
        assert set(self.told) <= set(found) <= {"old", "new"}
        for name, data in found.items():
            if name in self.told:
                assert data == self.told[name], f"{name}: {len(data)} bytes"
            else:
                final = {"old": OLD + MORE, "new": NEW}[name]
                assert final.startswith(data.rstrip(b"\0")), f"{name}: {len(data)} bytes"
                assert len(data) >= (len(OLD) if name == "old" else 0)
        until(lambda: self._shows(found))
        shutil.rmtree(self.top)  # the disk is small

    def _shows(self, found: dict[str, bytes]) -> bool:
        """A new transfer process is started up to a second after the last one was."""
        if any(errno_of((self.top / name).read_bytes) is not None for name in found):
            return False
        shown = {name: (self.top / name).read_bytes() for name in found}
        assert shown == found
        return True

    def _is_all_brought(self) -> bool:
        try:
            self.work("retry")
            self.work("sync")
        except SetupError:  # as above; or it was being tried while there was no room
            return False
        return not self.mount.status.pending


@contextmanager
def full_server(disk: Path, directory: Path, mode: str) -> Iterator[FullServer]:
    steps = Steps(directory / "steps")
    home = make_real_home(directory / "home")
    home.environ.update(steps.environ)
    with ssh_server(directory / "sshd") as server:
        served = served_by_ssh(server, disk).but(write=mode)
        with mounted(home, {"ns": served}, expected=[r" (WARNING|ERROR) "]) as mount:
            yield FullServer(mount, steps, disk, mode)


@pytest.mark.parametrize("mode", ["through", "back"])
@pytest.mark.parametrize("victim", ["daemon", "transfer", "both"] if FULL else ["daemon"])
def test_what_was_refused_outlives_kills(
    victim: str, mode: str, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    failed: list[str] = []
    with full_server(small_disk(8), tmp_path, mode) as here:
        counts = here.count(victim)
        print(counts)
        kinds = counts if FULL else {"journal": counts["journal"]}
        points = list(spread(kinds, MOST))
        for point in points:
            try:
                here.kill(victim, *point)
            except (AssertionError, OSError, SetupError) as error:
                failed.append(f"{point}: {type(error).__name__}: {str(error)[:1000]}")
                print("FAILED", failed[-1], here.mount.log[-3000:], flush=True)
                break
    print(f"{len(points)} points")
    assert not failed, "\n\n".join(failed)
