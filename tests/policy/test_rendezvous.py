"""The rendezvous file: what a mount believes of it, and the proof that both ends hold its keys."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import asyncssh
import msgspec
import pytest
from hypothesis import given, strategies as st

from hpcfs.model.errors import Unreachable, WrongSettings
from hpcfs.tunnel import file, proof
from hpcfs.tunnel.file import Rendezvous, TcpEndpoint, UnixEndpoint
from hpcfs.tunnel.proof import NotProved, prove_as_client, prove_as_server
from hpcfs.tunnel.stream import TunnelStream

GOOD = Rendezvous(
    id="0" * 32,
    secret="5" * 64,
    name="lap",
    laptop="lap.example",
    user="mo",
    login_host="login01",
    since="2026-11-25 10:00 UTC",
    places=[UnixEndpoint("/home/mo/.hpcfs/tunnels/lap-1.sock"), TcpEndpoint("login01", 4711)],
    host_key="ssh-ed25519 AAAA",
    client_key="-----BEGIN OPENSSH PRIVATE KEY-----",
    shares=["data"],
)
TUNNEL = bytes(16)
SESSION = bytes(range(16))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    found = tmp_path / ".hpcfs" / "tunnels"
    found.mkdir(parents=True, mode=0o700)
    found.parent.chmod(0o700)
    return found


def write(directory: Path, text: bytes, mode: int = 0o600, name: str = "lap") -> Path:
    path = directory / file.file_name(name)
    path.write_bytes(text)
    path.chmod(mode)
    return path


def test_what_was_written_is_read(directory: Path) -> None:
    write(directory, file.encode(GOOD))
    assert file.read(directory, "lap") == GOOD
    assert file.names(directory) == ["lap"]


def test_no_file_says_what_to_run(directory: Path, tmp_path: Path) -> None:
    for place in (directory, tmp_path / "missing" / "tunnels"):
        with pytest.raises(Unreachable, match="hpcfs tunnel HOST --name lap"):
            file.read(place, "lap")


def test_the_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(GOOD)
    assert "PRIVATE" not in f"{[GOOD]}"


@pytest.mark.parametrize("cut", [0, 1, 50, 200, -3])
def test_a_truncated_file_is_not_believed(directory: Path, cut: int) -> None:
    write(directory, file.encode(GOOD)[:cut])
    with pytest.raises(Unreachable, match=r"damaged.* writes it anew"):
        file.read(directory, "lap")


@pytest.mark.parametrize("text", [b'{"x": "\xff"}', b'{"x": ' + b"[" * 60_000, b"\0" * 1000])
def test_noise_is_not_believed(directory: Path, text: bytes) -> None:
    write(directory, text)
    with pytest.raises(Unreachable, match=r"damaged.* writes it anew"):
        file.read(directory, "lap")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 3}, "newer hpcfs.*here"),
        ({"version": 1}, "older hpcfs.*on the laptop"),
        ({"secret": "5" * 62}, "damaged"),
        ({"id": "xyz"}, "damaged"),
        ({"name": "../up"}, "damaged"),
        ({"name": "other"}, "another tunnel"),
        ({"places": [{"type": "tcp", "host": "-oProxyCommand=x", "port": 22}]}, "can't be"),
        ({"places": [{"type": "tcp", "host": "login01", "port": 70000}]}, "can't be"),
        ({"places": [{"type": "unix", "path": "relative.sock"}]}, "can't be"),
        ({"places": [{"type": "carrier-pigeon"}]}, "damaged"),
        ({"client_key": 7}, "damaged"),
    ],
)
def test_what_can_not_be_is_refused(directory: Path, changes: dict[str, Any], said: str) -> None:
    document = msgspec.json.decode(file.encode(GOOD)) | changes
    write(directory, msgspec.json.encode(document))
    with pytest.raises(Unreachable, match=said):
        file.read(directory, "lap")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o602])
def test_a_file_that_others_can_reach_is_refused(directory: Path, mode: int) -> None:
    write(directory, file.encode(GOOD), mode)
    with pytest.raises(WrongSettings, match=r"other users.*chmod go-rwx"):
        file.read(directory, "lap")


@pytest.mark.parametrize("up", [0, 1])
def test_a_directory_that_others_can_change_is_refused(directory: Path, up: int) -> None:
    write(directory, file.encode(GOOD))
    (directory, directory.parent)[up].chmod(0o777)
    with pytest.raises(WrongSettings, match="changed by other users"):
        file.read(directory, "lap")


def test_links_and_pipes_are_refused(directory: Path, tmp_path: Path) -> None:
    real = write(tmp_path, file.encode(GOOD), name="real")
    (directory / "lap.json").symlink_to(real)
    os.mkfifo(directory / "pipe.json", 0o600)
    for name in ("lap", "pipe"):
        with pytest.raises(WrongSettings, match="remove it"):
            file.read(directory, name)


def test_another_users_file_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(directory, file.encode(GOOD))
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    with pytest.raises(WrongSettings, match="belongs to another user"):
        file.read(directory, "lap")


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_sentence(text: bytes) -> None:
    with pytest.raises(ValueError, match="damaged"):
        file.decode(text)


# --- the proof --------------------------------------------------------------------------------


class Ends:
    """Two ends of a stream, each the other's pipe."""

    def __init__(self) -> None:
        self.client, self.server = TunnelStream(bytes(16)), TunnelStream(bytes(16))
        self.client.attach(Wire(self.server), 0)
        self.server.attach(Wire(self.client), 0)


class Wire:
    def __init__(self, other: TunnelStream) -> None:
        self._other = other

    def write(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(self._other.feed, data)

    def close(self) -> None:
        self._other.end("")


HOST_KEY = asyncssh.generate_private_key("ssh-ed25519")
CLIENT_KEY = asyncssh.generate_private_key("ssh-ed25519")
HOST_PUBLIC, CLIENT_PUBLIC = HOST_KEY.convert_to_public(), CLIENT_KEY.convert_to_public()
OTHER_KEY = asyncssh.generate_private_key("ssh-ed25519")


async def _meet(
    *,
    host: asyncssh.SSHKey = HOST_KEY,
    client: asyncssh.SSHKey = CLIENT_KEY,
    tunnel: bytes = TUNNEL,
) -> tuple[proof.ClientProof | BaseException, BaseException | None]:
    """A server with these keys, and a client with the right ones."""
    ends = Ends()

    async def serve() -> proof.ClientProof:
        try:
            return await prove_as_server(ends.server, TUNNEL, host, client.convert_to_public())
        except NotProved:
            ends.server.close()
            raise

    serving = asyncio.ensure_future(serve())
    asking = prove_as_client(
        ends.client, tunnel, CLIENT_KEY, HOST_PUBLIC, session=SESSION, host="login01"
    )
    said, proved = await asyncio.wait_for(
        asyncio.gather(serving, asking, return_exceptions=True), 10
    )
    return said, proved


def test_the_right_keys_open() -> None:
    said, proved = asyncio.run(_meet())
    assert isinstance(said, proof.ClientProof)
    assert (said.host, said.session, proved) == ("login01", SESSION, None)


def test_what_follows_the_proof_is_the_next_listeners() -> None:
    async def main() -> object:
        ends = Ends()
        serving = asyncio.ensure_future(
            prove_as_server(ends.server, TUNNEL, HOST_KEY, CLIENT_PUBLIC)
        )
        await prove_as_client(
            ends.client, TUNNEL, CLIENT_KEY, HOST_PUBLIC, session=SESSION, host="login01"
        )
        ends.client.write(b"first words")
        await serving
        heard = asyncio.get_running_loop().create_future()
        ends.server.listen(lambda data: heard.set_result(bytes(data)), lambda reason: None)
        return await asyncio.wait_for(heard, 10)

    assert asyncio.run(main()) == b"first words"


def test_a_server_with_another_key_is_not_believed() -> None:
    _, proved = asyncio.run(_meet(host=OTHER_KEY))
    assert isinstance(proved, NotProved)


@pytest.mark.parametrize("wrong", [{"client": OTHER_KEY}, {"tunnel": b"another tunnel's"}])
def test_a_client_of_another_tunnel_is_not_served(wrong: dict[str, Any]) -> None:
    said, proved = asyncio.run(_meet(**wrong))
    assert isinstance(said, NotProved)
    assert isinstance(proved, NotProved)


def test_nonsense_is_no_proof() -> None:
    async def main() -> None:
        ends = Ends()
        ends.client.write(b"\x00\x03abc")
        with pytest.raises(NotProved):
            await prove_as_server(ends.server, TUNNEL, HOST_KEY, CLIENT_PUBLIC)

    asyncio.run(main())
