"""A laptop, a login node and a compute node with networks of their own: the laptop reaches the
login node only, nobody reaches the laptop, the compute node the login node's inner address only.

Namespaces of Linux need root (in CI we are) and iproute2.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpcfs.tunnel.file import TcpEndpoint, UnixEndpoint
from tests.support.mounts import RealHome, until
from tests.support.nodes import Node, cable
from tests.support.seed import Seed
from tests.support.sshd import ALIAS, SshServer
from tests.support.tunnels import LoginNode, make_laptop

OUTER, INNER = "10.77.1", "10.77.2"
"""Networks of the laptop and of the compute node; the login node has the first address of each."""
PORT = 2222
LAPTOP, LOGIN, COMPUTE = f"{OUTER}.2", f"{INNER}.1", f"{INNER}.2"
CONTENT = "".join(f"line {number}\n" for number in range(2_000_000))
FULL = os.environ.get("HPCFS_FULL") == "1"
DOWN_SECONDS = 3.0
RETURN_SECONDS = 5.0
"""From the return of the laptop's network to the first read on each mount. Without other work on
the machine it was 0.02 to 2.2 s, after outages of 2 to 30 s, told and silent ones."""


@dataclass
class Place:
    """Where a user works: a machine, their home directory on it, a mount in that."""

    node: Node
    home: RealHome

    @property
    def mountpoint(self) -> Path:
        return self.home.path / f"on-{self.node.name}"

    @property
    def data(self) -> Path:
        return self.mountpoint / "data"

    def mount(self) -> None:
        done = self.try_to_mount()
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def try_to_mount(self) -> subprocess.CompletedProcess[str]:
        self.node.run("mkdir", "-p", self.mountpoint)
        return self.home.run("mount", self.mountpoint, "tunnel:lap")

    def umount(self) -> None:
        done = self.home.run("umount", self.mountpoint)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr

    def can_read(self, name: str) -> bool:
        command = [*self.node.enter, "cat", self.data / name]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass
class Cluster:
    laptop: Node
    login: Place
    compute: Place
    seed: Seed


@pytest.fixture
def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """With options of its sshd as the fixture's parameter."""
    with three_machines(tmp_path, request.param) as found:
        yield found


@contextmanager
def three_machines(directory: Path, options: list[str]) -> Iterator[Cluster]:
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpcfs-")))
        laptop, login, compute = (
            stack.enter_context(running(name)) for name in ("laptop", "login01", "c042")
        )
        cable(login, laptop, OUTER)
        cable(login, compute, INNER)
        shared, theirs = base / "home", base / "login"
        for home in (shared, theirs):
            home.mkdir(mode=0o700)
        # A socket on a file system that machines share leads to the kernel that it was made on. All
        # three have one kernel: the compute node must not have a file where the login node has one.
        login.run("mount", "--bind", shared, theirs)
        node = stack.enter_context(sshd(directory, login, theirs, options))
        there = make_laptop(directory / "laptop", LoginNode(node, shared))
        there.enter = laptop.enter
        places = [place(login, theirs, base), place(compute, shared, base)]
        found = Seed(LoginNode(node, shared), there, places[0].home)
        yield Cluster(laptop, *places, found)
        if found.tunnel is not None:
            found.end()
            assert found.node.left() == []


@contextmanager
def running(name: str) -> Iterator[Node]:
    node = Node(name)
    try:
        yield node
    finally:
        node.close()


@contextmanager
def sshd(directory: Path, login: Node, home: Path, options: list[str]) -> Iterator[SshServer]:
    server = SshServer(
        directory / "sshd",
        port=PORT,
        options=(*options, f"ListenAddress {LOGIN}"),
        subsystem=f"internal-sftp -d {home}",
        host=f"{OUTER}.1",
        enter=login.enter,
    )
    server.start()
    try:
        yield server
    finally:
        server.stop()


def place(node: Node, home: Path, base: Path) -> Place:
    run_directory = base / f"run-{node.name}"
    run_directory.mkdir(mode=0o700)
    return Place(node, RealHome(home, {"XDG_RUNTIME_DIR": str(run_directory)}, node.enter))


def with_sshd(*options: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("cluster", [list(options)], indirect=True, ids=[""])


# --- that this is the network it should be --------------------------------------------------------


def check_network(cluster: Cluster) -> None:
    assert cluster.laptop.can_reach(f"{OUTER}.1", PORT)
    assert not cluster.laptop.can_reach(LOGIN, PORT)
    assert cluster.laptop.sockets("listening") == "", "nothing there can be reached"
    compute = cluster.compute.node
    assert compute.can_reach(LOGIN, PORT)
    assert not compute.can_reach(f"{OUTER}.1", PORT)
    assert not compute.can_reach(LAPTOP, PORT)


def connections(node: Node) -> set[str]:
    """Where to there are any, as HOST:PORT."""
    return {line.split()[3] for line in node.sockets("established").splitlines()}


# --- tests ----------------------------------------------------------------------------------------


@with_sshd("GatewayPorts clientspecified")
def test_from_the_laptop_to_the_job(cluster: Cluster) -> None:
    seed, login, compute = cluster.seed, cluster.login, cluster.compute
    (seed.shared / "from the laptop").write_text(CONTENT)
    seed.start("--bind", LOGIN)
    check_network(cluster)
    login.mount()
    compute.mount()
    socket, port = seed.node.rendezvous().places
    assert isinstance(socket, UnixEndpoint)
    assert isinstance(port, TcpEndpoint)
    assert login.node.run("ls", socket.path)
    assert not Path(socket.path).exists(), "the compute node does not have it"
    assert connections(compute.node) == {f"{LOGIN}:{port.port}"}
    assert hosts(seed) == ["c042", "login01"]
    for number, here in enumerate((login, compute)):
        assert here.node.run("cat", here.data / "from the laptop") == CONTENT
        here.node.run("cp", here.data / "from the laptop", here.data / f"copy-{number}")
        assert (seed.shared / f"copy-{number}").read_text() == CONTENT
    assert login.node.run("cat", login.data / "copy-1") == CONTENT
    before = seed.place()
    seed.node.server.kill_sessions()
    for here in (login, compute):
        here.node.run("cp", here.data / "copy-1", here.data / "copy-2")
        assert (seed.shared / "copy-2").read_text() == CONTENT
    assert seed.place() != before
    login.umount()
    compute.umount()


def hosts(seed: Seed) -> list[str]:
    """Of the mounts that the laptop knows of."""
    (told,) = json.loads(seed.laptop.run("tunnel", "--status", "--json").stdout)
    return sorted(mount["host"] for mount in told["mounts"])


@with_sshd("GatewayPorts clientspecified", "AllowStreamLocalForwarding no")
def test_without_unix_sockets(cluster: Cluster) -> None:
    seed, login, compute = cluster.seed, cluster.login, cluster.compute
    (seed.shared / "file").write_text("content")
    seed.start("--bind", LOGIN)
    near, far = seed.node.rendezvous().places
    assert isinstance(near, TcpEndpoint)
    assert isinstance(far, TcpEndpoint)
    assert (near.host, far.host) == ("127.0.0.1", LOGIN)
    assert not cluster.laptop.can_reach(f"{OUTER}.1", far.port), "on that address only"
    for here, address in ((login, near), (compute, far)):
        here.mount()
        assert f"{address.host}:{address.port}" in connections(here.node)
        assert here.node.run("cat", here.data / "file") == "content"
        here.umount()


@with_sshd("GatewayPorts no")
def test_an_sshd_that_binds_loopback_only(cluster: Cluster) -> None:
    """It is said on all three machines, and the rest works."""
    seed, login, compute = cluster.seed, cluster.login, cluster.compute
    (seed.shared / "file").write_text("content")
    checked = seed.laptop.run("check", "--tunnel", ALIAS, "--bind", LOGIN)
    assert "GatewayPorts" in checked.stdout
    seed.start("--bind", LOGIN)
    login.mount()
    assert login.node.run("cat", login.data / "file") == "content"
    done = compute.try_to_mount()
    assert done.returncode == 1
    assert "can't be reached from c042: it is on login01" in done.stderr
    assert "start it on the laptop with --bind" in done.stderr
    checked = compute.home.run("check", "lap=tunnel:lap")
    assert (checked.returncode, "it is on login01" in checked.stdout) == (1, True), checked.stdout
    _, told = seed.end()
    assert f"asked for {LOGIN} (GatewayPorts no" in told
    assert "start the tunnel straight to the compute node" in told
    login.umount()


@with_sshd("AllowTcpForwarding no", "AllowStreamLocalForwarding no")
def test_an_sshd_that_grants_nothing(cluster: Cluster) -> None:
    done = cluster.seed.laptop.run("tunnel", ALIAS, "--name", "lap", "--share", cluster.seed.shared)
    assert done.returncode == 1
    assert "grants no reverse forward" in done.stderr
    assert "AllowTcpForwarding" in done.stderr
    checked = cluster.seed.laptop.run("check", "--tunnel", ALIAS, "--bind", LOGIN)
    assert (checked.returncode, "AllowTcpForwarding" in checked.stdout) == (1, True)


@pytest.mark.parametrize("is_lost", [False, True] if FULL else [False])
@with_sshd("GatewayPorts clientspecified")
def test_the_laptop_s_network_comes_back(cluster: Cluster, is_lost: bool) -> None:
    """After a moment, or so late that the mounts have given up."""
    seed, places = cluster.seed, (cluster.login, cluster.compute)
    for name in ("before", "after"):
        (seed.shared / name).write_text("content")
    seed.start("--bind", LOGIN)
    for here in places:
        here.mount()
        assert here.can_read("before")
    cluster.laptop.run("ip", "link", "set", "login01", "down")
    with reading(places[0], "after") as read:
        if is_lost:
            assert not read()
        else:
            time.sleep(DOWN_SECONDS)
        cluster.laptop.run("ip", "link", "set", "login01", "up")
        began = time.monotonic()
        assert is_lost or read()
    for here in places:
        until(lambda here=here: here.can_read("after"), RETURN_SECONDS)
    assert time.monotonic() - began < RETURN_SECONDS


@contextmanager
def reading(here: Place, name: str) -> Iterator[Callable[[], bool]]:
    """A program that reads; gives what waits for its end, and tells whether it could."""
    command = [*here.node.enter, "cat", str(here.data / name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        yield lambda: process.wait(60) == 0
