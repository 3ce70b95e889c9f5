"""What befalls a mount under torture, one thing after the other, and when each began and ended.

An outage that is shorter than the patience excuses nothing: programs must not notice it but by
waiting. What kills the daemon, or takes its disk or its descriptors, does.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.link import Link
from tests.support.mounts import Mount, kill, until
from tests.support.sshd import SshServer

REMOUNT_SECONDS = 60.0
SPARE_DESCRIPTORS = 3
LONG_SECONDS = 23.0
"""No longer than this an outage is certainly shorter than the patience: a lost connection must be
made again after it."""


@dataclass
class Blow:
    """One fault that happened; `until` is None while it lasts. Times are monotonic seconds."""

    name: str
    began: float
    is_excuse: bool
    until: float | None = None

    @property
    def excuses(self) -> bool:
        """Whether it is one, or lasted for too long: a loaded machine starts servers slowly."""
        return self.is_excuse or (self.until or time.monotonic()) - self.began > LONG_SECONDS

    def overlaps(self, since: float) -> bool:
        return self.until is None or self.until >= since


@dataclass
class History:
    """Everything that happened; used by all threads."""

    blows: list[Blow] = field(default_factory=list)
    suspended: float = 0.0
    """For how long the daemon stood still, in all."""
    began: float = field(default_factory=time.monotonic)

    @contextmanager
    def blow(self, name: str, *, is_excuse: bool) -> Iterator[None]:
        blow = Blow(name, time.monotonic(), is_excuse)
        self.blows.append(blow)
        try:
            yield
        finally:
            blow.until = time.monotonic()

    def excuse(self, since: float) -> str:
        """Which fault explains that a program failed that began then; empty where none does."""
        found = [one.name for one in self.blows if one.excuses and one.overlaps(since)]
        return found[-1] if found else ""

    def story(self, since: float) -> list[str]:
        """What happened from a minute before that time on."""
        return [
            f"{one.began - self.began:7.1f} s {one.name}"
            + ("" if one.until is None else f", for {one.until - one.began:.1f} s")
            for one in self.blows
            if one.overlaps(since - 60)
        ]


@dataclass
class Victims:
    """What can be hit."""

    mount: Mount
    mount_arguments: tuple[str | Path, ...]
    links: dict[str, Link]
    sshd: SshServer | None
    cache_disk: Path | None
    history: History
    remounting: threading.Lock = field(default_factory=threading.Lock)
    """Held while there is no mount."""

    def daemon(self) -> list[int]:
        return [self.mount.status.pid, *self.mount.transfer_processes()]


Fault = Callable[[Victims, random.Random], None]


def _link(name: str, seconds: float) -> Fault:
    def fault(victims: Victims, luck: random.Random) -> None:
        kind = luck.choice(sorted(victims.links))
        link = victims.links[kind]
        with victims.history.blow(f"link of {kind} {name}", is_excuse=False):
            {"cut": link.cut, "frozen": link.freeze, "deaf": link.deafen}[name]()
            time.sleep(seconds)
            link.mend()

    return fault


def _restart_server(victims: Victims, luck: random.Random) -> None:
    """As clients see it. A new sshd would be a child of this process, whose programs' open files
    it has to close first: on a mount that waits for its server."""
    assert victims.sshd
    link = victims.links["sftp"]
    with victims.history.blow("sshd restarted", is_excuse=False):
        link.cut()
        victims.sshd.kill_sessions()
        time.sleep(luck.uniform(0.5, 5))
        link.mend()


def _kill_sessions(victims: Victims, luck: random.Random) -> None:
    assert victims.sshd
    with victims.history.blow("SSH sessions killed", is_excuse=False):
        victims.sshd.kill_sessions()


def _kill_worker(victims: Victims, luck: random.Random) -> None:
    with victims.history.blow("worker process killed", is_excuse=False):
        if workers := victims.mount.transfer_processes():
            kill(luck.choice(workers))


def _suspend(victims: Victims, luck: random.Random) -> None:
    seconds = luck.uniform(5, 20)
    with victims.history.blow("everything stopped", is_excuse=False):
        stopped = victims.daemon()
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(seconds)
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    victims.history.suspended += seconds


def _kill_daemon(victims: Victims, luck: random.Random) -> None:
    with (
        victims.remounting,
        victims.history.blow("daemon killed and mounted again", is_excuse=True),
    ):
        victims.mount.kill_daemon()
        victims.mount.home.run("umount", victims.mount.path)
        until(lambda: not victims.mount.is_mounted, REMOUNT_SECONDS)
        victims.mount.mount(*victims.mount_arguments)


def _fill_disk(victims: Victims, luck: random.Random) -> None:
    assert victims.cache_disk
    file = victims.cache_disk / "filled"
    with victims.history.blow("cache disk full", is_excuse=True):
        with suppress(OSError), file.open("wb", buffering=0) as filling:
            while True:
                filling.write(bytes(1 << 20))
        time.sleep(luck.uniform(2, 10))
        file.unlink()


def _take_descriptors(victims: Victims, luck: random.Random) -> None:
    with victims.history.blow("descriptors exhausted", is_excuse=True):
        pid = victims.mount.status.pid
        soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        few = len(os.listdir(f"/proc/{pid}/fd")) + SPARE_DESCRIPTORS
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, hard))
        time.sleep(luck.uniform(2, 10))
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


FAULTS: dict[str, Fault] = {
    "cut-5": _link("cut", 5),
    "cut-20": _link("cut", 20),
    "frozen-5": _link("frozen", 5),
    "frozen-20": _link("frozen", 20),
    "deaf-10": _link("deaf", 10),
    "server": _restart_server,
    "sessions": _kill_sessions,
    "worker": _kill_worker,
    "suspend": _suspend,
    "daemon": _kill_daemon,
    "disk": _fill_disk,
    "descriptors": _take_descriptors,
}


def possible(victims: Victims) -> list[str]:
    """The faults that these victims can be hit by."""
    without = set()
    if victims.sshd is None:
        without |= {"server", "sessions"}
    if victims.cache_disk is None:
        without.add("disk")
    return [name for name in FAULTS if name not in without]
