"""A mount's requests through a real sshd to a tunnel: what comes out is what the laptop has, also
when the ssh connection is cut again and again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from hpcfs.model.sites import SftpRoot, SiteSpec, TunnelSite
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.tunnel.site import TunnelSiteConnection
from tests.remotes.contract import put
from tests.support.sshd import LOCAL_GID, LOCAL_UID
from tests.support.tunnels import NAME, LoginNode, login_node, running

MIB = 1024 * 1024
CONTENT = b"".join(number.to_bytes(8, "big") for number in range(32 * MIB // 8))
CUTS = 5
WAYS = {"unix": "", "tcp": "AllowStreamLocalForwarding no"}


@asynccontextmanager
async def mounted(node: LoginNode, cache: Path) -> AsyncIterator[SftpRemote]:
    spec = SiteSpec(
        site=TunnelSite(NAME, str(node.tunnels)),
        roots={"ns": SftpRoot("data")},
        state_dir=str(cache),
        uid=LOCAL_UID,
        gid=LOCAL_GID,
    )
    site = TunnelSiteConnection(spec)
    try:
        remote = site.remote("ns")
        await remote.connect()
        yield remote
    finally:
        await site.close()


async def fetched(remote: SftpRemote) -> bytes:
    entry = await remote.stat(b"file")
    return b"".join(await remote.fetch(b"file", entry.version, 0, len(CONTENT), 1))


async def brought(remote: SftpRemote, node: LoginNode) -> None:
    await put(remote, b"new", CONTENT)
    assert (node.server.root / "new").read_bytes() == CONTENT
    await remote.remove(b"new")


@pytest.mark.parametrize("way", WAYS)
def test_what_the_laptop_has_comes_out(tmp_path: Path, way: str) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node) as found:
            async with mounted(node, tmp_path) as remote:
                assert await fetched(remote) == CONTENT
                (mount,) = found.status.mounts
                assert mount.host == socket.gethostname()
                assert found.status.up == len(CONTENT)
                await brought(remote, node)
                assert found.status.down == len(CONTENT)
            await found.until(lambda: not found.status.mounts)

    with login_node(tmp_path, *filter(None, [WAYS[way]])) as node:
        (node.server.root / "file").write_bytes(CONTENT)
        uvloop.run(main(node))


@pytest.mark.parametrize("way", WAYS)
def test_cut_connections_lose_nothing(tmp_path: Path, way: str) -> None:
    async def main(node: LoginNode) -> None:
        async with running(node) as found, mounted(node, tmp_path) as remote:

            async def cut() -> None:
                for number in range(CUTS):
                    await found.until_up(number + 1)
                    await asyncio.sleep(0.1 * number)  # another moment each time
                    node.server.kill_sessions()

            cutting = asyncio.create_task(cut())
            while not cutting.done():
                assert await fetched(remote) == CONTENT
                await brought(remote, node)
            await cutting
            await found.until_up(CUTS + 1)
            assert await fetched(remote) == CONTENT
            assert len(found.status.mounts) == 1

    with login_node(tmp_path, *filter(None, [WAYS[way]])) as node:
        (node.server.root / "file").write_bytes(CONTENT)
        uvloop.run(main(node))
