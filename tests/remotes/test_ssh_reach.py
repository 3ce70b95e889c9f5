"""Login nodes that share a name: which of its addresses a login goes to, and how soon."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from hpcfs.model.errors import AccessRefused, HostKeyRefused, NotConnected, Unreachable
from hpcfs.model.sites import SshSite
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.ssh import reach
from hpcfs.remotes.ssh.login import log_in
from tests.support.mounts import until
from tests.support.sshd import ALIAS, LOOPBACK, ScriptedPrompter, SshServer, free_port

NAME = "login.example.org"
ALIVE = "127.0.0.2"
PATIENCE = 20.0
"""What one address may take to answer: none of the tests may wait for it to pass."""

Broken = Callable[[str, int], Any]


@contextmanager
def drops(address: str, port: int) -> Iterator[None]:
    """As a node that is off: no answer to a SYN, since the queue of a listener is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((address, port), backlog=0))
        full = []
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            full.append(waiting.connect_ex((address, port)))
        assert listener.fileno() >= 0
        yield


@contextmanager
def hangs(address: str, port: int) -> Iterator[None]:
    """As a node without memory: its kernel takes connections, and no sshd greets."""
    with socket.create_server((address, port)):
        yield


@contextmanager
def refuses(address: str, port: int) -> Iterator[None]:
    yield


@contextmanager
def hangs_up(address: str, port: int) -> Iterator[None]:
    """As sshd with too many connections (MaxStartups), and a load balancer without a node."""
    listener = socket.create_server((address, port))
    with listener:

        def run() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=run)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


BROKEN = [drops, hangs, refuses, hangs_up]
broken = pytest.mark.parametrize("node", BROKEN, ids=[one.__name__ for one in BROKEN])


@contextmanager
def node_at(address: str, directory: Path, port: int | None = None) -> Iterator[SshServer]:
    server = SshServer(
        directory, host=address, port=port or free_port(), options=("LogLevel INFO",)
    )
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[SshServer]:
    with node_at(ALIVE, tmp_path / "alive") as server:
        yield server


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the resolver says of NAME, in its order."""
    found: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if host != NAME or port is None:
            return real(host, port, *more, **named)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, int(port))) for one in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return found


def named(server: SshServer, patience: float = PATIENCE) -> SshSite:
    """The site, by the name."""
    text = server.config_text().replace(f"HostName {server.host}", f"HostName {NAME}")
    server.ssh_config.write_text(text)
    server.known_hosts.write_text(server.known_hosts.read_text().replace(server.host, NAME))
    return SshSite(ALIAS, ssh_config=str(server.ssh_config), connect_timeout=patience)


async def seconds_to_log_in(site: SshSite) -> float:
    began = time.monotonic()
    login = await log_in(site, ScriptedPrompter())
    taken = time.monotonic() - began
    await login.close()
    return taken


@broken
def test_a_node_that_is_down_costs_a_moment(
    node: Broken, alive: SshServer, addresses: list[str]
) -> None:
    addresses += ["127.0.0.1", ALIVE]
    with node("127.0.0.1", alive.port):
        assert asyncio.run(seconds_to_log_in(named(alive))) < PATIENCE / 2
    assert alive.log.count("Accepted ") == 1


def test_only_the_last_of_many_answers(alive: SshServer, addresses: list[str]) -> None:
    dead = [f"127.0.0.{number}" for number in range(3, 8)]
    addresses += [*dead, ALIVE]
    with ExitStack() as stack:
        for number, address in enumerate(dead):
            stack.enter_context(BROKEN[number % len(BROKEN)](address, alive.port))
        assert asyncio.run(seconds_to_log_in(named(alive))) < PATIENCE / 2


def test_a_jump_host_has_several_addresses_too(
    alive: SshServer, sshd: SshServer, addresses: list[str], tmp_path: Path
) -> None:
    addresses += ["127.0.0.1", ALIVE]
    named(alive)
    gate = alive.ssh_config.read_text().replace(f"Host {ALIAS}", "Host gate")
    config = tmp_path / "config"
    config.write_text(sshd.config_text(ALIAS, "ProxyJump gate") + gate)
    site = SshSite(ALIAS, ssh_config=str(config), connect_timeout=PATIENCE)
    with drops("127.0.0.1", alive.port):
        assert asyncio.run(seconds_to_log_in(site)) < PATIENCE / 2
    assert alive.log.count("Accepted ") == 1


def test_what_became_of_each_is_told(alive: SshServer, addresses: list[str]) -> None:
    site = named(alive, 1.0)
    addresses += ["127.0.0.1", "127.0.0.3", "127.0.0.4"]
    said = (
        r"no address of cluster \(login.example.org\) port \d+ answers: "
        r"127.0.0.3 \(connection refused\), 127.0.0.1 \(no answer within 1 s\), "
        r"127.0.0.4 \(no answer within 1 s\)"
    )
    with (
        drops("127.0.0.1", alive.port),
        hangs("127.0.0.4", alive.port),
        pytest.raises(Unreachable, match=said),
    ):
        asyncio.run(seconds_to_log_in(site))


def test_a_further_attempt_gives_each_as_long_as_it_is_told(
    alive: SshServer, addresses: list[str]
) -> None:
    """A tunnel that lost its connection, which tries again soon."""
    addresses += ["127.0.0.1"]
    with (
        drops("127.0.0.1", alive.port),
        pytest.raises(Unreachable, match=r"did not answer within 0.2 s"),
    ):
        asyncio.run(log_in(named(alive), ScriptedPrompter(), 0.2))


def test_a_refused_login_is_not_tried_at_the_next_address(
    alive: SshServer, addresses: list[str], tmp_path: Path
) -> None:
    with node_at("127.0.0.3", tmp_path / "other", alive.port) as other:
        alive.authorized_keys.write_text("")
        other.authorized_keys.write_text("")
        site = named(alive)
        alive.known_hosts.write_text(
            alive.known_hosts.read_text() + other.known_hosts.read_text().replace(other.host, NAME)
        )
        addresses += [ALIVE, "127.0.0.3"]
        with pytest.raises(AccessRefused, match="refused the login"):
            asyncio.run(seconds_to_log_in(site))
        # The first that greets is logged in to: on a busy machine that may be either.
        tried = until(lambda: (alive.log + other.log).count("authenticating user"))
        assert tried == 1


def test_the_login_goes_where_the_host_key_was_shown(
    alive: SshServer, addresses: list[str], tmp_path: Path
) -> None:
    """Nodes whose keys differ: a "yes" for one must not lead to another, whose key would count as
    a changed one."""
    with node_at("127.0.0.3", tmp_path / "other", alive.port) as other:
        other.authorized_keys.write_text(alive.authorized_keys.read_text())
        site = named(alive)
        alive.known_hosts.write_text("")

        class TurnsRound(ScriptedPrompter):
            async def ask(self, text: str, *, echo: bool = False) -> str | None:
                addresses.reverse()
                return await super().ask(text, echo=echo)

        addresses += [ALIVE, "127.0.0.3"]

        async def main() -> None:
            spec = alive.site_spec(site=site)
            connection = SshSiteConnection(spec, TurnsRound("yes"))
            try:
                await connection.remote("ns").connect()
            finally:
                await connection.close()

        asyncio.run(main())
        assert (alive.log.count("Accepted "), other.log.count("Accepted ")) == (1, 0)
        addresses[:] = ["127.0.0.3"]
        with pytest.raises(HostKeyRefused, match="is not the one in"):
            asyncio.run(seconds_to_log_in(site))


# --- the race itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@broken
def test_the_first_that_greets_wins_and_nothing_is_left(
    node: Broken, run: Callable[..., Any], alive: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer process runs on uvloop."""

    async def two(name: str, port: int, family: int) -> list[reach.AddressInfo]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port)) for one in ("127.0.0.1", ALIVE)
        ]

    monkeypatch.setattr(reach, "_resolve", two)

    async def main() -> None:
        host = reach.Destination(NAME, alive.port)
        for _ in range(3):
            sock = await reach.reach(host, PATIENCE)
            with sock:
                assert sock.getpeername() == (ALIVE, alive.port)
                assert sock.recv(4) == b"SSH-", "the first byte is still there"
                again = await reach.reach(host, PATIENCE, reach.address_of(sock))
                with again:
                    assert again.getpeername() == (ALIVE, alive.port)

    with node("127.0.0.1", alive.port):
        run(main())


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_one_that_gives_up_leaves_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()

    async def two(name: str, port: int, family: int) -> list[reach.AddressInfo]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, port))
            for one in ("127.0.0.3", "127.0.0.4")
        ]

    monkeypatch.setattr(reach, "_resolve", two)

    async def main() -> None:
        before = open_files()
        trying = asyncio.create_task(reach.reach(reach.Destination(NAME, port), PATIENCE))
        for _ in range(100):
            await asyncio.sleep(0)
            if open_files() > before:
                break
        trying.cancel()
        await asyncio.wait([trying])
        assert trying.cancelled()
        assert open_files() == before

    with hangs("127.0.0.3", port), hangs("127.0.0.4", port):
        asyncio.run(main())


def test_families_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    six, four = socket.AF_INET6, socket.AF_INET

    def resolve(*_: Any, **__: Any) -> Any:
        return [
            (six, 1, 6, "", ("::1", 22, 0, 0)), (six, 1, 6, "", ("::2", 22, 0, 0)),
            (six, 1, 6, "", ("::1", 22, 0, 0)), (four, 1, 6, "", ("127.0.0.1", 22)),
        ]  # fmt: skip

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    found = asyncio.run(reach._resolve(NAME, 22, socket.AF_UNSPEC))
    assert [one[4][0] for one in found] == ["::1", "127.0.0.1", "::2"]


def test_the_bind_address_and_the_family_of_the_configuration_count(
    alive: SshServer, addresses: list[str]
) -> None:
    addresses += ["127.0.0.1", ALIVE]
    site = named(alive)
    with alive.ssh_config.open("a") as config:
        config.write("    BindAddress 127.0.0.77\n    AddressFamily inet\n")

    async def main() -> str:
        login = await log_in(site, ScriptedPrompter())
        try:
            return str(login.connection.get_extra_info("sockname")[0])
        finally:
            await login.close()

    assert asyncio.run(main()) == "127.0.0.77"


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (b"", NotConnected),
        (b"Exceeded MaxStartups\r\n", Unreachable),
        (b"SSH-2.0-OpenSSH_9.9\r\n", Unreachable),
    ],
)
def test_a_server_that_has_too_much_to_do_is_asked_less_often(
    words: bytes, kind: type[Unreachable]
) -> None:
    """Than a place where nobody answers: a load balancer without a node, a forward of a port."""

    async def main() -> None:
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(words)
            writer.close()

        async with await asyncio.start_server(take, LOOPBACK, 0) as listener:
            port = listener.sockets[0].getsockname()[1]
            with pytest.raises(Unreachable) as found:
                await log_in(SshSite(LOOPBACK, port=port), ScriptedPrompter())
            assert type(found.value) is kind

    asyncio.run(main())
