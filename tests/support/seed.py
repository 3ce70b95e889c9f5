"""A tunnel as users run it: `hpcfs tunnel` on a laptop and `hpcfs mount` on the cluster, each in a
process and a home directory of its own, and a real sshd between them."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.link import Link, ssh_config_through
from tests.support.mounts import OnDisk, RealHome, Served, make_real_home, until
from tests.support.tunnels import NAME, Laptop, LoginNode, login_node, make_laptop

EXPECTED = ("tunnel (named )?lap|the laptop lap|not uploaded yet",)
"""What a mount's log says of a laptop that is away."""


@dataclass
class Seed:
    """`home` is the cluster's."""

    node: LoginNode
    laptop: Laptop
    home: RealHome
    tunnel: subprocess.Popen[str] | None = None

    @property
    def shared(self) -> Path:
        """The laptop's folder: `data` of the mount."""
        return self.laptop.share

    def served(self, **keys: str | bool | float) -> Served:
        """Links are handed out as they are, since trees with links to anywhere are copied."""
        named = {"type": "tunnel", "tunnel": NAME, "symlinks": "follow"}
        return Served("tunnel", {**named}, OnDisk(self.shared)).but(**keys)

    def place(self) -> str:
        """Another one after each login of the tunnel; empty where none is up."""
        try:
            return str(self.node.rendezvous().places)
        except FileNotFoundError:
            return ""

    def start(self, *arguments: str | Path) -> None:
        """Returns when it is up."""
        before = self.place()
        self.tunnel = self.laptop.start_tunnel(*arguments)
        self.until_elsewhere(before)

    def until_elsewhere(self, before: str) -> str:
        """The tunnel has logged in anew."""
        until(lambda: self.place() not in ("", before), what="the tunnel is up")
        return self.place()

    def end(self, how: signal.Signals = signal.SIGTERM) -> tuple[str, str]:
        """What it wrote on stdout and stderr."""
        assert self.tunnel is not None
        ended, self.tunnel = self.tunnel, None
        ended.send_signal(how)
        told = ended.communicate(timeout=20)
        assert ended.returncode == (-9 if how == signal.SIGKILL else 0), told
        return told


@contextlib.contextmanager
def seed(directory: Path, *options: str) -> Iterator[Seed]:
    """No tunnel runs yet; one that still does at the end is ended."""
    with login_node(directory, *options) as node:
        laptop = make_laptop(directory / "laptop", node)
        found = Seed(node, laptop, make_real_home(node.home))
        try:
            yield found
        finally:
            if found.tunnel is not None:
                found.end()


def lead_through(link: Link, found: Seed) -> None:
    """The laptop's next login takes this way to the login node."""
    config = found.laptop.path / ".ssh" / "config"
    config.write_text(ssh_config_through(link, found.node.server))
