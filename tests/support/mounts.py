"""Real mounts for tests: `hpcfs mount` in a process and a home of its own, over real servers.

A `Served` is a folder on a running server: how the configuration names it, and what is in it as
the server itself (or another program) sees it. A `Mount` is one `hpcfs mount` of several of them.
Its log is part of what is tested: a traceback, or a warning that no test asked for, is a failure.
"""

from __future__ import annotations

import itertools
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest

from hpcfs.control import control
from hpcfs.control.control import MountStatus, NamespaceStatus, PendingFile
from hpcfs.system import mountinfo, paths
from tests.support.command import Home, end_mounts_below
from tests.support.s3 import S3Server
from tests.support.sshd import ALIAS, SshServer

T = TypeVar("T")

KINDS = ("sftp", "s3-rclone", "s3-moto")
WRITE_MODES = ("through", "back")
"""The `write` modes of namespaces that tests run in."""
_PROBLEM = re.compile(
    r"^Traceback|^\S+ \S+ \w+\[\d+\] (?:WARNING|ERROR|CRITICAL) .*$", re.MULTILINE
)
_LOG_SHOWN = 6000
_numbers = itertools.count()


def until(condition: Callable[[], T], seconds: float = 20.0, what: str = "") -> T:
    """Wait for something that is true; the only place where tests let time pass."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what or condition}"
        time.sleep(0.01)
    return found


def run(
    *command: str | bytes | Path, cwd: Path | None = None, seconds: float = 280, **environ: str
) -> str:
    """What the program wrote on stdout; it must succeed."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environ},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        check=False,
    )
    told = done.stderr.decode(errors="replace")
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {told}"
    return done.stdout.decode(errors="surrogateescape")


def errno_of(call: object, *arguments: object, **more: object) -> int | None:
    """With which errno the call fails; None if it does not."""
    try:
        call(*arguments, **more)  # type: ignore[operator]
    except OSError as error:
        return error.errno
    return None


# --- what servers have ----------------------------------------------------------------------------


class Inside(Protocol):
    """A served folder, seen without hpcfs. Paths are relative to it."""

    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes) -> None: ...

    def remove(self, path: str) -> None: ...

    def exists(self, path: str) -> bool: ...


@dataclass
class OnDisk:
    root: Path

    def read(self, path: str) -> bytes:
        return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def remove(self, path: str) -> None:
        (self.root / path).unlink()

    def exists(self, path: str) -> bool:
        return os.path.lexists(self.root / path)


@dataclass
class InBucket:
    server: S3Server
    prefix: str

    def _place(self, path: str) -> dict[str, str]:
        return {"Bucket": self.server.bucket, "Key": f"{self.prefix}/{path}"}

    def read(self, path: str) -> bytes:
        with self.server.client() as client, client.get_object(**self._place(path))["Body"] as body:
            return bytes(body.read())

    def write(self, path: str, data: bytes) -> None:
        with self.server.client() as client:
            client.put_object(**self._place(path), Body=data)

    def remove(self, path: str) -> None:
        with self.server.client() as client:
            client.delete_object(**self._place(path))

    def exists(self, path: str) -> bool:
        with self.server.client() as client:
            found = client.list_objects_v2(
                Bucket=self.server.bucket, Prefix=f"{self.prefix}/{path}", MaxKeys=1
            )
        return "Contents" in found


@dataclass(frozen=True)
class Served:
    """`keys` are the lines of a namespace's table in the configuration."""

    kind: str
    keys: dict[str, str | bool | float]
    inside: Inside
    credentials: tuple[str, str] | None = None
    """Access key and secret key, to be found in ~/.aws under the profile that `keys` names."""

    @property
    def is_s3(self) -> bool:
        return self.credentials is not None

    def but(self, **keys: str | bool | float) -> Served:
        return Served(self.kind, {**self.keys, **keys}, self.inside, self.credentials)


def served_by_ssh(
    server: SshServer, folder: Path | None = None, ssh_config: Path | None = None
) -> Served:
    folder = folder or server.root / f"folder-{next(_numbers)}"
    folder.mkdir(exist_ok=True)
    keys = {"host": ALIAS, "path": str(folder), "ssh_config": str(ssh_config or server.ssh_config)}
    return Served("sftp", {"type": "sftp", **keys}, OnDisk(folder))


def served_by_s3(kind: str, server: S3Server, endpoint_url: str | None = None) -> Served:
    prefix = f"folder-{next(_numbers)}"
    keys: dict[str, str | bool | float] = {
        "type": "s3",
        "bucket": server.bucket,
        "prefix": prefix,
        "endpoint_url": endpoint_url or server.endpoint_url,
        "region": server.region,
        "profile": kind,
    }
    return Served(kind, keys, InBucket(server, prefix), (server.access_key, server.secret_key))


def in_write_mode(served: Served, mode: str) -> Served:
    return served if mode == "through" else served.but(write=mode)


# --- mounts ---------------------------------------------------------------------------------------


class RealHome(Home):
    """Runs the installed `hpcfs`."""

    def command(self, *arguments: str | Path) -> list[str]:
        return [str(Path(sys.executable).with_name("hpcfs")), *map(str, arguments)]


@dataclass
class Mount:
    """`home` may be shared by mounts at several mount points; each has a log and a cache."""

    home: RealHome
    namespaces: dict[str, Served]
    top: dict[str, str] = field(default_factory=dict)
    name: str = "mnt"
    expected: list[str] = field(default_factory=list)
    """Patterns of log lines that are no problem."""
    told: str = ""
    """By the last mount command, on stderr."""
    _checked: int = 0

    @property
    def path(self) -> Path:
        return self.home.path / self.name

    @property
    def environ(self) -> dict[str, str]:
        return self.home.environment()

    def write_config(self) -> None:
        lines = [f"{key} = {_toml(value)}" for key, value in self.top.items()]
        for name, served in self.namespaces.items():
            lines.append(f'[namespaces."{name}"]')
            lines += [f"{key} = {_toml(value)}" for key, value in served.keys.items()]
        self.home.config.parent.mkdir(parents=True, exist_ok=True)
        self.home.config.write_text("\n".join(lines) + "\n")
        self._write_credentials()

    def _write_credentials(self) -> None:
        lines = []
        served = self.namespaces.values()
        profiles = {one.keys["profile"]: one.credentials for one in served if one.credentials}
        for profile, (access, secret) in profiles.items():
            lines.append(f"[{profile}]")
            lines += [f"aws_access_key_id = {access}", f"aws_secret_access_key = {secret}"]
        (self.home.path / ".aws").mkdir(exist_ok=True)
        (self.home.path / ".aws" / "credentials").write_text("\n".join(lines) + "\n")

    def mount(self, *arguments: str | Path) -> str:
        """Returns what the command wrote on stderr; it must succeed."""
        if self.namespaces:
            self.write_config()
        with suppress(FileExistsError):
            self.path.mkdir()
        done = self.home.run("mount", *arguments, self.path)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr + self.log
        self.told = done.stderr
        return done.stderr

    def umount(self) -> str:
        """The exit code tells whether something of this mount is not on its remote."""
        status = self.status
        lost = any(one.is_stuck and one.since >= status.started for one in status.pending)
        done = self.home.run("umount", self.path)
        assert done.returncode == int(lost), done.stderr + self.log
        return done.stderr

    def remount(self, *arguments: str | Path) -> None:
        self.umount()
        self.mount(*arguments)

    @property
    def is_mounted(self) -> bool:
        return mountinfo.at(self.path, mountinfo.read()) is not None

    # --- the daemon -------------------------------------------------------------------------------

    @property
    def status(self) -> MountStatus:
        return control.query_status(paths.find_socket(self.path, self.environ))

    def namespace(self, name: str) -> NamespaceStatus:
        return next(found for found in self.status.namespaces if found.name == name)

    @property
    def kept(self) -> list[PendingFile]:
        return [one for one in self.status.pending if one.state == "kept"]

    def kill_daemon(self) -> None:
        """Returns once the kernel has noticed."""
        kill(self.status.pid)

    def transfer_processes(self) -> list[int]:
        """Of the daemon that runs now."""
        children = Path(f"/proc/{self.status.pid}/task").glob("*/children")
        found = [int(pid) for file in children for pid in file.read_text().split()]
        return [pid for pid in found if b"hpcfs.worker" in _command_line(pid)]

    # --- its log ----------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        file = paths.log_file(self.path, self.environ)
        return file.read_text(errors="replace") if file.exists() else "(no log)"

    def problems(self) -> list[str]:
        """Lines that no test expected, since the last time."""
        text = self.log
        new, self._checked = text[self._checked :], len(text)
        found = [match.group() for match in _PROBLEM.finditer(new)]
        return [line for line in found if not any(re.search(one, line) for one in self.expected)]

    def check_log(self) -> None:
        found = self.problems()
        assert not found, "\n".join(["the daemon's log has:", *found])


def _toml(value: str | bool | float) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it just ended


def kill(pid: int, how: signal.Signals = signal.SIGKILL) -> None:
    """Returns once the process has ended."""
    process = os.pidfd_open(pid)
    os.kill(pid, how)
    select.select([process], [], [], 10)
    os.close(process)


def make_real_home(path: Path) -> RealHome:
    path.mkdir(parents=True, exist_ok=True)
    (path / "run").mkdir(mode=0o700)
    return RealHome(path.resolve())


@contextmanager
def mounted(
    home: RealHome,
    namespaces: dict[str, Served],
    *arguments: str | Path,
    expected: Iterable[str] = (),
    **top: str,
) -> Iterator[Mount]:
    """A mount for the length of a block; at its end the log has nothing that was not `expected`."""
    mount = Mount(home, namespaces, top, expected=list(expected))
    try:
        mount.mount(*arguments)
        yield mount
        if mount.is_mounted:
            mount.umount()
        mount.check_log()
    except BaseException as error:
        error.add_note(f"log of {mount.path}:\n{mount.log[-_LOG_SHOWN:]}")
        raise
    finally:
        end_mounts_below(home.path)


# --- pytest ---------------------------------------------------------------------------------------


def mounts_of(item: pytest.Item) -> Iterator[Mount]:
    """Of the fixtures that the test uses."""
    for value in getattr(item, "funcargs", {}).values():
        found = value if isinstance(value, Mount) else getattr(value, "mount", None)
        if isinstance(found, Mount):
            yield found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """To be imported by a conftest: a failed test shows the logs of its mounts."""
    report = yield
    if report.failed:
        for mount in {id(mount): mount for mount in mounts_of(item)}.values():
            report.sections.append((f"log of {mount.path}", mount.log[-_LOG_SHOWN:]))
    return report
