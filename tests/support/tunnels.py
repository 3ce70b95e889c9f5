"""Tunnels for tests: a real sshd as the login node, with a home directory of its own, and tunnels
to it in this process or as a user starts them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcfs.laptop.shares import Share
from hpcfs.laptop.status import TunnelStatus
from hpcfs.laptop.tunnel import Tunnel, TunnelPlan
from hpcfs.tunnel.file import Rendezvous, decode
from hpcfs.tunnel.knock import GREETING
from tests.support.command import Home
from tests.support.sshd import ALIAS, ScriptedPrompter, SshServer, ssh_server

NAME = "lap"
WAIT_SECONDS = 20.0


@dataclass
class LoginNode:
    """`home` is what SFTP calls the home directory: sshd would take the one of passwd."""

    server: SshServer
    home: Path

    @property
    def tunnels(self) -> Path:
        return self.home / ".hpcfs" / "tunnels"

    @property
    def file(self) -> Path:
        return self.tunnels / f"{NAME}.json"

    def rendezvous(self) -> Rendezvous:
        return decode(self.file.read_bytes())

    def left(self) -> list[str]:
        return sorted(path.name for path in self.tunnels.iterdir())

    def make_directory(self, mode: int = 0o700) -> Path:
        self.tunnels.parent.mkdir(mode=0o700)
        self.tunnels.mkdir()
        self.tunnels.chmod(mode)
        return self.tunnels


@contextlib.contextmanager
def login_node(directory: Path, *options: str, home: Path | None = None) -> Iterator[LoginNode]:
    """Without `home` its name is short: a socket's path may not be as long as pytest's."""
    with tempfile.TemporaryDirectory(prefix="hpcfs-") as short:
        home = home or Path(short)
        subsystem = f"internal-sftp -d {home}"
        with ssh_server(directory / "sshd", *options, subsystem=subsystem) as server:
            yield LoginNode(server, home)


class Running:
    """A tunnel in this process."""

    def __init__(self, node: LoginNode, bind: str | None = None, name: str = NAME) -> None:
        self.states: list[str] = []
        shares = (Share("data", node.server.root),)
        plan = TunnelPlan(name=name, site=node.server.site(), shown=ALIAS, shares=shares, bind=bind)
        self.tunnel = Tunnel(plan, ScriptedPrompter(), self._note)
        self.task = asyncio.create_task(self.tunnel.run())

    def _note(self) -> None:
        self.states.append(self.tunnel.status().state)

    @property
    def status(self) -> TunnelStatus:
        return self.tunnel.status()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Raises what ends the tunnel before."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                await asyncio.wait([self.task], timeout=0.01)
                if self.task.done():
                    self.task.result()
                    raise AssertionError("the tunnel ended")

    async def until_up(self, times: int = 1) -> None:
        await self.until(lambda: self.states.count("up") >= times)

    async def stop(self) -> None:
        self.tunnel.stop()
        await self.task


@contextlib.asynccontextmanager
async def running(
    node: LoginNode, bind: str | None = None, name: str = NAME
) -> AsyncIterator[Running]:
    """One that is up; raises what it fails with."""
    found = Running(node, bind, name)
    try:
        await found.until_up()
        yield found
    finally:
        if not found.task.done():
            await found.stop()


async def greeting(place: socket.socket) -> bytes:
    """What is said first to somebody who connected; empty when it is closed."""
    loop = asyncio.get_running_loop()
    place.setblocking(False)
    async with asyncio.timeout(WAIT_SECONDS):
        return await loop.sock_recv(place, len(GREETING) + 33)


# --- as a user starts them ------------------------------------------------------------------------


class Laptop(Home):
    """A home directory whose ~/.ssh/config knows the login node."""

    def command(self, *arguments: str | Path) -> list[str]:
        program = "from hpcfs.cli.main import main; main()"
        return [sys.executable, "-c", program, *map(str, arguments)]

    @property
    def share(self) -> Path:
        return self.path / "data"

    def start_tunnel(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return self.start("tunnel", ALIAS, "--name", NAME, "--share", self.share, *arguments)

    def status(self) -> TunnelStatus | None:
        """None where none runs."""
        import msgspec

        result = self.run("tunnel", "--status", "--json")
        found = msgspec.convert(json.loads(result.stdout), type=list[TunnelStatus])
        return found[0] if found else None

    def wait_for(self, condition: Callable[[TunnelStatus], bool]) -> TunnelStatus:
        deadline = time.monotonic() + WAIT_SECONDS
        found = None
        while time.monotonic() < deadline:
            found = self.status()
            if found is not None and condition(found):
                return found
        raise AssertionError(f"it did not come to that: {found}")

    def wait_until_up(self) -> TunnelStatus:
        return self.wait_for(lambda found: found.state == "up")


def make_laptop(path: Path, node: LoginNode) -> Laptop:
    for name in ("run", ".ssh", "data"):
        (path / name).mkdir(mode=0o700, parents=True)
    (path / ".ssh" / "config").write_text(node.server.ssh_config.read_text())
    return Laptop(path)


def own_address() -> str:
    """Of this machine, and not loopback. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def is_root() -> bool:
    return os.getuid() == 0
