"""A real OpenSSH server for tests, with keys, known_hosts and an ssh_config of its own.

Runs as root or as an ordinary user on a free loopback port; everything it needs lives in one
temporary directory and nothing of the user's ~/.ssh is read or written.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncssh

from hpcfs.model.sites import SftpRoot, SiteSpec, SshSite

START_SECONDS = 20.0
LOOPBACK = "127.0.0.1"
ALIAS = "cluster"
LOCAL_UID = 4321
LOCAL_GID = 8765


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _sshd_binary() -> str:
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    assert found is not None, "sshd is missing: apt install openssh-server"
    return found


def sftp_server_binary() -> str:
    for place in ("/usr/lib/openssh", "/usr/libexec/openssh", "/usr/lib/ssh", "/usr/libexec"):
        if Path(place, "sftp-server").exists():
            return str(Path(place, "sftp-server"))
    raise AssertionError("sftp-server is missing: apt install openssh-sftp-server")


@dataclass
class SshServer:
    """`root` is the directory meant to be served; `ssh_config` has the alias "cluster"."""

    directory: Path
    port: int = field(default_factory=free_port)
    options: tuple[str, ...] = ()
    subsystem: str | None = "internal-sftp"
    host: str = LOOPBACK
    enter: tuple[str, ...] = ()
    """Before a command, so that it runs on the machine that the server is on (nodes.py)."""
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.user = pwd.getpwuid(os.getuid()).pw_name
        self.root = self.directory / "served"
        self.root.mkdir(parents=True)
        self.key = write_key(self.directory / "user_key")
        self.host_key = write_key(self.directory / "host_key")
        self.known_hosts = self.directory / "known_hosts"
        self.known_hosts.write_text(self.known_hosts_line(self.host_key))
        self.authorized_keys = self.directory / "authorized_keys"
        self.authorized_keys.write_text(_public(self.key))
        self.ssh_config = self.directory / "ssh_config"
        self.ssh_config.write_text(self.config_text())

    def known_hosts_line(self, host_key: Path) -> str:
        return f"[{self.host}]:{self.port} {_public(host_key)}"

    def config_text(self, alias: str = ALIAS, *more: str) -> str:
        lines = [
            f"HostName {self.host}",
            f"Port {self.port}",
            f"User {self.user}",
            f"IdentityFile {self.key}",
            "IdentitiesOnly yes",
            f"UserKnownHostsFile {self.known_hosts}",
            *more,
        ]
        return f"Host {alias}\n" + "".join(f"    {line}\n" for line in lines)

    def site(self, connect_timeout: float = 10.0, transport: str = "asyncssh") -> SshSite:
        return SshSite(
            ALIAS,
            ssh_config=str(self.ssh_config),
            connect_timeout=connect_timeout,
            transport=transport,
        )

    def site_spec(self, path: str | None = None, site: SshSite | None = None) -> SiteSpec:
        return SiteSpec(
            site=site or self.site(),
            roots={"ns": SftpRoot(path or str(self.root))},
            state_dir=str(self.directory),
            uid=LOCAL_UID,
            gid=LOCAL_GID,
        )

    # --- the process ----------------------------------------------------------------------------

    @property
    def log(self) -> str:
        return (self.directory / "sshd.log").read_text(errors="replace")

    def start(self) -> None:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # privilege separation wants it
        config = self.directory / "sshd_config"
        config.write_text(self._server_config())
        with (self.directory / "sshd.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self.enter, _sshd_binary(), "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_until_it_answers()

    def _server_config(self) -> str:
        lines = [
            *self.options,  # sshd takes the first of several values
            f"Port {self.port}",
            f"ListenAddress {self.host}",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.authorized_keys}",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin yes",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "LogLevel ERROR",
        ]
        if self.subsystem is not None:
            lines.append(f"Subsystem sftp {self.subsystem}")
        return "\n".join(lines) + "\n"

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._greeting() == b"SSH-":
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=0.01)
                raise AssertionError(f"sshd ended at once:\n{self.log}")
        raise AssertionError(f"sshd does not answer:\n{self.log}")

    def _greeting(self) -> bytes:
        """Empty where nobody answers."""
        if self.enter:
            script = f"exec 3<>/dev/tcp/{self.host}/{self.port} && head -c 4 <&3"
            command = [*self.enter, "bash", "-c", script]
            return subprocess.run(command, capture_output=True, check=False, timeout=10).stdout
        with (
            contextlib.suppress(ConnectionRefusedError, ConnectionResetError),
            socket.create_connection((self.host, self.port), timeout=5) as probe,
        ):
            return probe.recv(4)
        return b""

    def stop(self) -> None:
        """The server and its sessions end; clients see closed connections."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def sessions(self) -> list[int]:
        """Their processes, without the server itself."""
        assert self._process is not None
        return _descendants(self._process.pid)

    def kill_sessions(self) -> None:
        """The server goes on."""
        for pid in self.sessions():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        sessions = _descendants(self._process.pid)
        for pid in (self._process.pid, *sessions):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, how)
        self._process.wait(timeout=START_SECONDS)
        self._process = None

    def restart(self) -> None:
        self.stop()
        self.start()


@contextlib.contextmanager
def ssh_server(
    directory: Path, *options: str, subsystem: str | None = "internal-sftp"
) -> Iterator[SshServer]:
    """A running server; `options` are lines of sshd_config that win over the usual ones."""
    server = SshServer(directory, options=options, subsystem=subsystem)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def ordinary_user(directory: Path) -> Iterator[SshServer]:
    """A server whose remote user is not root, also where the tests are run by root."""
    if os.getuid():
        with ssh_server(directory) as server:
            yield server
        return
    keys = directory / "authorized_keys"  # only root gets there
    options = (f"AuthorizedKeysCommand /bin/cat {keys}", "AuthorizedKeysCommandUser root")
    server = SshServer(directory, options=options)
    server.user = "nobody"
    server.ssh_config.write_text(server.config_text())
    try:
        server.start()
        yield server
    finally:
        server.stop()


def write_key(path: Path, passphrase: str | None = None) -> Path:
    """A new Ed25519 key pair: `path` and `path`.pub."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    if passphrase is None:
        key.write_private_key(path)
    else:
        key.write_private_key(path, "pkcs8-pem", passphrase=passphrase)
    path.chmod(0o600)
    key.write_public_key(f"{path}.pub")
    return path


def _public(key: Path) -> str:
    return Path(f"{key}.pub").read_text()


def _descendants(pid: int) -> list[int]:
    """sshd's sessions leave its process group, so they are found by parentage."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = status.read_text(errors="replace").rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, todo = [], [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


class ScriptedPrompter:
    """Answers questions in order and keeps what was asked; None means that nobody is there."""

    def __init__(self, *answers: str | None):
        self._answers = list(answers)
        self.asked: list[tuple[str, bool]] = []

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        self.asked.append((text, echo))
        return self._answers.pop(0) if self._answers else None
