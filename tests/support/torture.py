"""Random faults on real mounts for as long as wanted, with programs at work and an oracle.

What must hold: a program fails only where a fault excuses that; what it was told is written is
there at the end, on the remote, byte for byte; what it reads is a version that existed; no call
takes longer than the patience and a margin; memory, descriptors and threads of the daemon stay; its
log has no traceback. `scripts/torture` runs it; docs/reliability.md has figures.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from botocore.exceptions import ClientError

from tests.support import leftovers
from tests.support.command import end_mounts_below
from tests.support.disks import small_disk
from tests.support.link import link_to, ssh_config_through
from tests.support.mounts import (
    Mount,
    Served,
    make_real_home,
    served_by_s3,
    served_by_ssh,
    until,
)
from tests.support.s3 import rclone_s3
from tests.support.sshd import ssh_server
from tests.support.torture_faults import FAULTS, History, Victims, possible
from tests.support.torture_programs import PROGRAMS, Calls, Failed, Program, Wrong, digest

KINDS = ("sftp", "s3")
MODES = ("through", "back")
PATIENCE = 30.0
MARGIN = 25.0
"""On top of the patience: a loaded machine, and a read of several requests."""
QUIET_SECONDS = (5.0, 9.0)
"""Between two faults: a namespace must answer meanwhile, so that outages don't add up."""
DISK_MEGABYTES = 600
SYNC_SECONDS = 240.0
LOG_LINES = 60
GROWTH = 1.3
GROWTH_BYTES = 40 << 20


@dataclass
class Violation:
    what: str
    story: list[str]

    def __str__(self) -> str:
        return "\n".join([f"VIOLATION: {self.what}", *(f"    {line}" for line in self.story)])


@dataclass
class Sample:
    """Of the daemon: bytes, numbers."""

    memory: int
    descriptors: int
    threads: int


@dataclass
class Torture:
    """One run."""

    seed: int
    seconds: float
    kinds: tuple[str, ...] = KINDS
    modes: tuple[str, ...] = MODES
    faults: tuple[str, ...] = tuple(FAULTS)
    history: History = field(default_factory=History)
    calls: Calls = field(default_factory=Calls)
    violations: list[Violation] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    happened: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    log: str = ""
    """Of the mount, once it is over."""

    def __post_init__(self) -> None:
        self._luck = random.Random(self.seed)
        self._over = threading.Event()

    # --- the run ----------------------------------------------------------------------------------

    def run(self, base: Path) -> None:
        """Go on for `seconds`, or until a violation."""
        with self._mounted(base) as victims:
            self._make_programs(victims.mount, base)
            threads = [
                threading.Thread(target=self._work, args=(program, victims), daemon=True)
                for program in self.programs
            ]
            for thread in threads:
                thread.start()
            try:
                self._strike_for(victims, self.seconds)
            finally:
                self._over.set()
                self.log = victims.mount.log
            for thread in threads:
                thread.join(PATIENCE + MARGIN + 240)
            if any(thread.is_alive() for thread in threads):
                self._violated(f"never ended: {self.calls.under_way}", self.history.began)
                return
            for program in self.programs:
                program.end()
            if not self.violations:
                self._judge(victims)

    @contextmanager
    def _mounted(self, base: Path) -> Iterator[Victims]:
        with ExitStack() as stack:
            links, namespaces, sshd = {}, {}, None
            if "sftp" in self.kinds:
                sshd = stack.enter_context(ssh_server(base / "sshd"))
                links["sftp"] = stack.enter_context(link_to(sshd.port))
                config = base / "ssh_config"
                config.write_text(ssh_config_through(links["sftp"], sshd))
            if "s3" in self.kinds:
                s3 = stack.enter_context(rclone_s3(base / "s3"))
                port = int(s3.endpoint_url.rpartition(":")[2])
                links["s3"] = stack.enter_context(link_to(port))
                url = f"http://127.0.0.1:{links['s3'].port}"
            for kind in self.kinds:
                for mode in self.modes:
                    if kind == "sftp":
                        assert sshd
                        served = served_by_ssh(sshd, ssh_config=config)
                    else:
                        served = served_by_s3("s3-rclone", s3, url)
                    namespaces[f"{kind}-{mode}"] = served.but(write=mode)
            disk = None
            if os.geteuid() == 0 and "disk" in self.faults:
                disk = stack.enter_context(small_disk(base / "disk", DISK_MEGABYTES))
            cache = disk or base
            arguments = ("--cache-dir", cache / "cache")
            home = make_real_home(base / "home")
            top = {"journal_size": "100 MB", "cache_size": "300 MB"}
            mount = Mount(home, namespaces, top)
            stack.callback(end_mounts_below, base)
            mount.mount(*arguments)
            yield Victims(mount, arguments, links, sshd, disk, self.history)

    def _make_programs(self, mount: Mount, base: Path) -> None:
        for name in mount.namespaces:
            for kind in PROGRAMS:
                local = base / f"local-{name}-{kind.__name__}"
                local.mkdir()
                luck = random.Random(f"{self.seed} {name} {kind.__name__}")
                program = kind(mount.path, name, local, luck, self.calls, self._suspended)
                self.programs.append(program)

    def _work(self, program: Program, victims: Victims) -> None:
        """Rounds of one program until all is over."""
        is_begun, begun_at = False, time.monotonic()
        while not self._over.is_set():
            with victims.remounting:  # there is a mount
                began = time.monotonic()
            try:
                if not is_begun:
                    begun_at = began
                    program.begin()
                    is_begun = True
                program.round()
                program.rounds["done"] += 1
            except Wrong as wrong:
                self._violated(f"{program.name}: {wrong}", began)
            except (Failed, OSError) as error:
                is_begun = False
                program.rounds["failed"] += 1
                is_of_old_mount = isinstance(error, OSError) and error.errno == errno.ENOTCONN
                if excuse := self.history.excuse(begun_at if is_of_old_mount else began):
                    self.excused[excuse] += 1
                    time.sleep(0.5)
                else:
                    self._violated(f"{program.name} failed without a reason: {error}", began)
            except Exception:
                is_begun = False
                self._violated(f"{program.name}: {traceback.format_exc()}", began)

    def _strike_for(self, victims: Victims, seconds: float) -> None:
        end = time.monotonic() + seconds
        names = [name for name in possible(victims) if name in self.faults]
        while time.monotonic() < end and not self.violations:
            quiet = self._luck.uniform(*QUIET_SECONDS)
            for _ in range(max(1, int(quiet))):
                self._sample(victims)
                time.sleep(quiet / max(1, int(quiet)))
            name = self._luck.choice(names)
            self.happened[name] += 1
            FAULTS[name](victims, self._luck)

    def _violated(self, what: str, since: float) -> None:
        self.violations.append(Violation(what, self.history.story(since)))
        self._over.set()

    def _suspended(self) -> float:
        return self.history.suspended

    # --- the judgement ----------------------------------------------------------------------------

    def _judge(self, victims: Victims) -> None:
        mount = victims.mount
        until(lambda: mount.home.run("sync", mount.path).returncode in (0, 1), SYNC_SECONDS)
        for program in self.programs:
            self._judge_files(program, mount.path, mount.namespaces[program.namespace])
            for check in program.ledger.checks:
                if found := check():
                    self._violated(f"{program.name}: {found}", self.history.began)
        if self.calls.longest > PATIENCE + MARGIN:
            slow = f"{self.calls.what} took {self.calls.longest:.1f} s"
            self._violated(slow, self.history.began)
        if "Traceback" in mount.log:
            self._violated(f"the log has a traceback: {_traceback(mount.log)}", self.history.began)
        self._judge_samples()

    def _judge_files(self, program: Program, mount_point: Path, served: Served) -> None:
        for path, wanted in program.ledger.files.items():
            below = path.partition("/")[2]
            for where in ("mount", "remote"):
                try:
                    here = where == "mount"
                    data = (mount_point / path).read_bytes() if here else served.inside.read(below)
                    found = digest(data)
                except (OSError, ClientError) as error:
                    found = str(error)
                if found not in (wanted, program.ledger.doubt.get(path)):
                    what = f"{program.name}: {path} on the {where} is {found}, was told {wanted}"
                    self._violated(what, self.history.began)

    def _judge_samples(self) -> None:
        if len(self.samples) < 200:
            return
        quarter = len(self.samples) // 4
        for name in ("memory", "descriptors", "threads"):
            early, late = (
                statistics.median(getattr(one, name) for one in some)
                for some in (self.samples[quarter : 2 * quarter], self.samples[-quarter:])
            )
            if late > early * GROWTH + (GROWTH_BYTES if name == "memory" else 40):
                self._violated(f"{name} grew from {early} to {late}", self.history.began)

    def _sample(self, victims: Victims) -> None:
        pid = victims.mount.status.pid
        status = Path(f"/proc/{pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        memory = int(fields["VmRSS"].split()[0]) * 1024
        descriptors = len(os.listdir(f"/proc/{pid}/fd"))
        self.samples.append(Sample(memory, descriptors, int(fields["Threads"])))

    def table(self) -> str:
        """What was done, what befell it, and what was found."""
        lines = [f"seed {self.seed}, {self.seconds:g} s"]
        lines += [f"  {name:20} {count:6}" for name, count in sorted(self.happened.items())]
        lines.append("programs: rounds done, failed")
        for one in self.programs:
            done, failed = one.rounds["done"], one.rounds["failed"]
            lines.append(f"  {one.name:24} {done:6} {failed:4}  {len(one.ledger.files)} files")
        lines.append(f"failures excused: {dict(self.excused)}")
        lines.append(f"longest call: {self.calls.longest:.1f} s ({self.calls.what})")
        if self.samples:
            most = max(one.memory for one in self.samples) >> 20
            last = self.samples[-1]
            lines.append(
                f"daemon: at most {most} MB, at the end {last.memory >> 20} MB, "
                f"{last.descriptors} descriptors, {last.threads} threads"
            )
        lines += [str(one) for one in self.violations[:10]] or ["nothing that must not be"]
        if self.violations:
            lines += ["the end of the mount's log:", *self.log.splitlines()[-LOG_LINES:]]
        return "\n".join(lines)


def _traceback(log: str) -> str:
    at = log.index("Traceback")
    return log[max(0, at - 300) : at + 1500]


def main(arguments: list[str] | None = None) -> int:
    """The command line of scripts/torture; 1 where something was found."""
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--kinds", default=",".join(KINDS), help="of remotes")
    parser.add_argument("--modes", default=",".join(MODES), help="of writing")
    parser.add_argument("--faults", default=",".join(FAULTS), help="that may happen")
    given = parser.parse_args(arguments)
    kinds, modes, faults = (
        tuple(str(names).split(",")) for names in (given.kinds, given.modes, given.faults)
    )
    for ending in (signal.SIGTERM, signal.SIGINT):  # then nothing is left mounted
        signal.signal(ending, signal.default_int_handler)
    torture = Torture(given.seed, given.seconds, kinds, modes, faults)
    with tempfile.TemporaryDirectory(prefix="hpcfs-torture-") as directory:
        base = Path(directory).resolve()
        lock = leftovers.hold(base)
        try:
            torture.run(base)
        finally:
            print(torture.table(), flush=True)
            leftovers.end(leftovers.of_run(base))
            os.close(lock)
    return 1 if torture.violations else 0


if __name__ == "__main__":
    sys.exit(main())
