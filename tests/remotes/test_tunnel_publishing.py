"""The tunnel's file on the cluster: where it may be, and which of two tunnels has the name."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcfs.laptop import tunnel
from hpcfs.laptop.publishing import NameTaken
from hpcfs.model.errors import RemoteError, WrongSettings
from tests.support.tunnels import NAME, LoginNode, is_root, login_node, make_laptop, running

OTHER_USER = 12345


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LoginNode]:
    with login_node(tmp_path) as found:
        yield found


def refused(node: LoginNode, said: str) -> None:
    async def main() -> None:
        with pytest.raises(RemoteError, match=said) as caught:
            async with running(node):
                pass
        assert isinstance(caught.value, WrongSettings)

    asyncio.run(main())
    assert not node.file.exists()


@pytest.mark.parametrize("which", ["tunnels", "parent"])
def test_a_directory_that_others_may_change_is_refused(node: LoginNode, which: str) -> None:
    node.make_directory()
    (node.tunnels if which == "tunnels" else node.tunnels.parent).chmod(0o770)
    refused(node, "can be changed by other users.*chmod go-w")


def test_a_directory_that_others_may_read_is_closed(node: LoginNode) -> None:
    node.make_directory(0o755)

    async def main() -> None:
        async with running(node):
            assert node.tunnels.stat().st_mode & 0o777 == 0o700

    asyncio.run(main())


@pytest.mark.parametrize("which", [".hpcfs", "tunnels"])
def test_a_symbolic_link_is_refused(node: LoginNode, which: str) -> None:
    elsewhere = node.home / "elsewhere"
    elsewhere.mkdir()
    link = node.home / ".hpcfs"
    if which == "tunnels":
        link.mkdir()
        link /= "tunnels"
    link.symlink_to(elsewhere)
    refused(node, "is a symbolic link")
    assert list(elsewhere.iterdir()) == []


def test_a_file_in_the_directory_s_place_is_refused(node: LoginNode) -> None:
    (node.home / ".hpcfs").write_text("")
    refused(node, "is no directory")


@pytest.mark.skipif(not is_root(), reason="only root can give a directory away")
@pytest.mark.parametrize("which", ["tunnels", "both"])
def test_somebody_else_s_directory_is_refused(node: LoginNode, which: str) -> None:
    node.make_directory()
    os.chown(node.tunnels, OTHER_USER, OTHER_USER)
    if which == "both":
        os.chown(node.tunnels.parent, OTHER_USER, OTHER_USER)
    refused(node, f"belongs to user {OTHER_USER}")
    assert node.left() == []


@pytest.mark.parametrize("content", [b"", b'{"version": 1, "id": "0', b"\xff\x00", b"[]"])
def test_a_damaged_file_is_replaced(node: LoginNode, content: bytes) -> None:
    node.make_directory()
    node.file.write_bytes(content)

    async def main() -> None:
        async with running(node):
            assert node.rendezvous().name == NAME

    asyncio.run(main())
    assert node.left() == []


def test_a_link_in_the_file_s_place_is_replaced_and_not_followed(node: LoginNode) -> None:
    node.make_directory()
    precious = node.home / "precious"
    precious.write_text("precious")
    node.file.symlink_to(precious)

    async def main() -> None:
        async with running(node):
            assert not node.file.is_symlink()

    asyncio.run(main())
    assert precious.read_text() == "precious"


def test_the_second_of_two_tunnels_of_one_name_is_refused(node: LoginNode) -> None:
    async def main() -> None:
        async with running(node) as first:
            before = node.file.read_bytes()
            with pytest.raises(NameTaken, match=rf"{NAME} is up.*{socket.gethostname()}.*--name"):
                async with running(node):
                    pass
            assert node.file.read_bytes() == before
            assert first.status.state == "up"
            async with running(node, name="other"):
                assert {"lap.json", "other.json"} <= set(node.left())
            assert node.file.read_bytes() == before

    asyncio.run(main())
    assert node.left() == []


@pytest.mark.parametrize("option", ["", "AllowStreamLocalForwarding no", "PermitOpen none"])
def test_a_tunnel_that_was_killed_leaves_its_name(tmp_path: Path, option: str) -> None:
    with login_node(tmp_path / "node", *([option] if option else [])) as node:
        laptop = make_laptop(tmp_path / "laptop", node)
        process = laptop.start_tunnel()
        laptop.wait_until_up()
        process.kill()
        process.communicate()
        stale = node.rendezvous()
        assert node.left()

        async def main() -> None:
            async with running(node):
                assert node.rendezvous().id != stale.id
                sockets = [name for name in node.left() if name.endswith(".sock")]
                assert len(sockets) == (option != "AllowStreamLocalForwarding no")

        asyncio.run(main())
        assert node.left() == []


def test_a_tunnel_whose_session_sshd_has_not_given_up_is_no_obstacle(
    node: LoginNode, tmp_path: Path
) -> None:
    """Its laptop sleeps: sshd takes connections, and nobody greets."""
    laptop = make_laptop(tmp_path / "laptop", node)
    asleep = laptop.start_tunnel()
    laptop.wait_until_up()
    asleep.send_signal(signal.SIGSTOP)
    stale = node.rendezvous()

    async def main() -> None:
        async with running(node):
            assert node.rendezvous().id != stale.id
            asleep.send_signal(signal.SIGCONT)
            # it was asleep for less than sshd noticed, and finds its name taken
            await asyncio.to_thread(asleep.wait, 40)
            assert node.rendezvous().id != stale.id

    asyncio.run(main())
    assert asleep.returncode == 1
    assert asleep.stderr is not None
    assert "was replaced by one from" in asleep.stderr.read()
    assert node.left() == []
    asleep.communicate()


def test_a_tunnel_that_was_replaced_ends_and_leaves_the_file_alone(
    node: LoginNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "WATCH_SECONDS", 0.05)

    async def main() -> None:
        async with running(node) as found:
            other = node.file.read_bytes().replace(node.rendezvous().id.encode(), b"f" * 32)
            node.file.write_bytes(other)
            with pytest.raises(NameTaken, match="was replaced by one from"):
                await found.task
        assert node.file.read_bytes() == other

    asyncio.run(main())


def test_a_file_that_somebody_removed_is_written_anew(
    node: LoginNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnel, "WATCH_SECONDS", 0.05)

    async def main() -> None:
        async with running(node) as found:
            before = node.rendezvous()
            node.file.unlink()
            await found.until(node.file.exists)
            assert node.rendezvous() == before

    asyncio.run(main())
