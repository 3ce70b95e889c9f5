"""Which forwards a real sshd grants, and what the tunnel makes of each refusal."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest

from hpcfs.laptop import forwards
from hpcfs.model.errors import WrongSettings
from hpcfs.tunnel.file import TcpEndpoint, UnixEndpoint
from hpcfs.tunnel.knock import GREETING
from tests.support.tunnels import LoginNode, greeting, login_node, own_address, running


def expected_greeting(node: LoginNode) -> bytes:
    return GREETING + node.rendezvous().id.encode() + b" "


def test_a_unix_socket_that_only_the_user_can_reach(tmp_path: Path) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node) as found:
            (place,) = node.rendezvous().places
            assert isinstance(place, UnixEndpoint)
            status = os.lstat(place.path)
            assert stat.S_ISSOCK(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o600
            assert stat.S_IMODE(node.tunnels.stat().st_mode) == 0o700
            assert stat.S_IMODE(node.file.stat().st_mode) == 0o600
            assert found.status.places == [place.path]
            assert found.status.notes == []
            with socket.socket(socket.AF_UNIX) as mount:
                mount.connect(place.path)
                assert await greeting(mount) == expected_greeting(node)
        assert node.left() == []

    with login_node(tmp_path) as node:
        asyncio.run(main(node))


def test_a_socket_that_sshd_opens_to_all_is_closed_to_others(tmp_path: Path) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node):
            (place,) = node.rendezvous().places
            assert isinstance(place, UnixEndpoint)
            assert stat.S_IMODE(os.lstat(place.path).st_mode) == 0o600

    with login_node(tmp_path, "StreamLocalBindMask 0000") as node:
        asyncio.run(main(node))


def test_a_loopback_port_where_unix_sockets_are_forbidden(tmp_path: Path) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node) as found:
            (place,) = node.rendezvous().places
            assert isinstance(place, TcpEndpoint)
            assert place.host == "127.0.0.1"
            assert "forbids it (AllowStreamLocalForwarding)" in found.status.notes[0]
            with socket.create_connection((place.host, place.port)) as mount:
                assert await greeting(mount) == expected_greeting(node)

    with login_node(tmp_path, "AllowStreamLocalForwarding no") as node:
        asyncio.run(main(node))


def test_a_loopback_port_where_the_home_directory_has_a_long_name(tmp_path: Path) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node) as found:
            (place,) = node.rendezvous().places
            assert isinstance(place, TcpEndpoint)
            assert "too long" in found.status.notes[0]

    home = tmp_path / ("long" * 20)
    home.mkdir()
    with login_node(tmp_path, home=home) as node:
        asyncio.run(main(node))


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("AllowTcpForwarding no", "AllowTcpForwarding"),
        ("AllowTcpForwarding local", "AllowTcpForwarding"),
        ("DisableForwarding yes", "AllowStreamLocalForwarding"),
    ],
)
def test_no_forward_at_all_is_an_error_that_says_so(
    tmp_path: Path, option: str, setting: str
) -> None:
    async def main(node: LoginNode) -> None:
        with pytest.raises(WrongSettings, match=rf"no reverse forward.*{setting}.*hpcfs mount"):
            async with running(node):
                pass
        assert node.left() == []

    with login_node(tmp_path, option) as node:
        asyncio.run(main(node))


def test_a_path_that_is_taken_leads_to_a_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(node: LoginNode) -> None:
        taken = node.home / "taken.sock"
        taken.touch()
        monkeypatch.setattr(
            "hpcfs.laptop.publishing.TunnelDirectory.new_socket", lambda self, name: str(taken)
        )
        async with running(node) as found:
            (place,) = node.rendezvous().places
            assert isinstance(place, TcpEndpoint)
            assert "can't be made at" in found.status.notes[0]
        assert taken.exists()

    with login_node(tmp_path) as node:
        asyncio.run(main(node))


# --- reached from other machines ------------------------------------------------------------------


def test_a_bind_address_that_sshd_grants(tmp_path: Path) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node, bind=own_address()) as found:
            unix, tcp = node.rendezvous().places
            assert isinstance(unix, UnixEndpoint)
            assert isinstance(tcp, TcpEndpoint)
            assert tcp.host == own_address()
            assert found.status.notes == []
            with socket.create_connection((tcp.host, tcp.port)) as mount:
                assert await greeting(mount) == expected_greeting(node)

    with login_node(tmp_path, "GatewayPorts clientspecified") as node:
        asyncio.run(main(node))


@pytest.mark.parametrize("option", ["GatewayPorts no", "PermitOpen none"])
def test_a_bind_address_that_silently_became_loopback(tmp_path: Path, option: str) -> None:
    """Seen where connecting from the login node is forbidden, too."""

    async def main(node: LoginNode) -> None:
        async with running(node, bind=own_address()) as found:
            assert [type(place) for place in node.rendezvous().places] == [UnixEndpoint]
            (note,) = found.status.notes
            assert "compute nodes can't reach this tunnel" in note
            assert "listens on 127.0.0.1" in note
            assert forwards.OTHER_WAYS in note

    with login_node(tmp_path, option) as node:
        asyncio.run(main(node))


def test_a_bind_address_without_a_look_at_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a chroot: connecting shows it."""
    monkeypatch.setattr("hpcfs.laptop.listening.TABLES", ("/proc/none",))

    async def main(node: LoginNode) -> None:
        async with running(node, bind=own_address()) as found:
            (note,) = found.status.notes
            assert f"nothing of ours answers at {own_address()}" in note

    with login_node(tmp_path) as node:
        asyncio.run(main(node))


def test_a_bind_address_of_another_machine(tmp_path: Path) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node, bind="192.0.2.77") as found:
            (note,) = found.status.notes
            assert "has not that address" in note

    with login_node(tmp_path, "GatewayPorts clientspecified") as node:
        asyncio.run(main(node))


def test_what_nobody_takes_is_dropped_with_its_connection(tmp_path: Path) -> None:
    """A mount may come back again and again, be sent what it has not got, and read none of it."""

    async def main(node: LoginNode) -> None:
        async with running(node) as found:
            (place,) = node.rendezvous().places
            assert isinstance(place, UnixEndpoint)
            with socket.socket(socket.AF_UNIX) as mount:
                mount.connect(place.path)
                await greeting(mount)
                (incoming,) = found.tunnel._mounts.acceptor._strangers.all()
                channel = incoming.pipe._channel  # type: ignore[attr-defined]
                incoming.pipe.write(bytes(32 * 1024 * 1024))
                assert channel.get_write_buffer_size() > 16 * 1024 * 1024
                incoming.close()
                assert channel.get_write_buffer_size() == 0

    with login_node(tmp_path) as node:
        asyncio.run(main(node))
