"""What is no SSH server at the other end: a login fails, in time, and is tried again by itself.

HPCFS_FUZZ_LOGINS=N makes it longer, HPCFS_FUZZ_SEED=N repeats one.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcfs.model.errors import RemoteError, Unreachable
from hpcfs.model.sites import SshSite
from hpcfs.remotes.base import NO_PROMPTER
from hpcfs.remotes.ssh.login import log_in
from tests.support.sshd import LOOPBACK

LOGINS = int(os.environ.get("HPCFS_FUZZ_LOGINS", "40"))
SEED = int(os.environ.get("HPCFS_FUZZ_SEED", "0"))
VERSION = b"SSH-2.0-Odd\r\n"
LISTS = (
    b"", b"\xff\xfe", b"a,b,c", b"none", b"curve25519-sha256", b"ssh-ed25519",
    b"aes128-ctr", b"hmac-sha2-256",
)  # fmt: skip


def _key_exchange(luck: random.Random) -> bytes:
    """SSH_MSG_KEXINIT (RFC 4253, section 7.1), more or less."""
    names = [luck.choice(LISTS) for _ in range(10)]
    lists = b"".join(len(one).to_bytes(4, "big") + one for one in names)
    padding = luck.choice((4, 8, 11))
    packet = bytes([padding, 20]) + luck.randbytes(16) + lists + bytes(5 + padding)
    length = len(packet) if luck.random() < 0.7 else luck.choice((0, 1, 5, 2**31, 2**32 - 1))
    return length.to_bytes(4, "big") + packet


def _greeting(luck: random.Random) -> bytes:
    return luck.choice(
        (
            luck.randbytes(luck.randrange(200)),
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
            VERSION + luck.randbytes(100),
            VERSION + _key_exchange(luck) + _key_exchange(luck),
            b"SSH-1.5-x\r\n",
            b"SSH-2.0-\xff\xfe\r\n" + _key_exchange(luck),
        )
    )


async def _outcomes(base: Path, greeting: Callable[[], bytes], logins: int) -> Counter[str]:
    """How logins end at a server that says this and ends the connection."""
    found: Counter[str] = Counter()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting())
        await reader.read(1)  # the client says something at once
        writer.close()

    server = await asyncio.start_server(meet, LOOPBACK, 0)
    port = server.sockets[0].getsockname()[1]
    config = base / "ssh_config"
    config.write_text(
        f"Host cluster\n HostName {LOOPBACK}\n Port {port}\n User tester\n"
        f" UserKnownHostsFile {base}/known_hosts\n"
    )
    for _ in range(logins):
        try:
            async with asyncio.timeout(30):
                await log_in(SshSite("cluster", ssh_config=str(config)), NO_PROMPTER)
        except RemoteError as error:
            is_choice = "no algorithm in common" in error.message
            is_well = isinstance(error, Unreachable) or is_choice
            found["is well" if is_well else error.message] += 1
    server.close()
    await server.wait_closed()
    return found


def test_what_is_no_ssh_is_no_setting(tmp_path: Path) -> None:
    luck = random.Random(SEED)
    found = asyncio.run(_outcomes(tmp_path, lambda: _greeting(luck), LOGINS))
    assert found == {"is well": LOGINS}, f"HPCFS_FUZZ_SEED={SEED}"


@pytest.mark.parametrize(
    "greeting", [b"SSH-2.0-\xff\xfe\r\n", VERSION + bytes.fromhex("0000000c0414")]
)
def test_bytes_that_are_no_text_are_the_servers_fault(tmp_path: Path, greeting: bytes) -> None:
    found = asyncio.run(_outcomes(tmp_path, lambda: greeting, 1))
    assert found == {"is well": 1}
