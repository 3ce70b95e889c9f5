"""Connects to a laptop as a mount would, and tells who is there, for `hpcfs check` on a cluster."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path

import uvloop

from hpcfs.model.errors import RemoteError, TimedOut
from hpcfs.model.sites import SftpRoot, SiteSpec, TunnelSite
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.ssh.shared_session import SharedSession
from hpcfs.remotes.tunnel.line import RendezvousFile
from hpcfs.remotes.tunnel.session import TunnelLogin, open_session
from hpcfs.tunnel.file import Rendezvous

SECONDS = 30.0


@dataclass(frozen=True)
class Laptop:
    """The laptop that answered. `shares` is what it shows, `obstacle` why the namespace's folder
    can't be mounted, or empty."""

    rendezvous: Rendezvous
    is_private: bool
    """Reached through a socket that only the user can open; else a port, with SSH behind it."""
    shares: list[str]
    obstacle: str


def look(site: TunnelSite, root: SftpRoot) -> Laptop:
    """Return the laptop behind a tunnel. Raises RemoteErrors: those that a mount would meet."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_look(site, root))


async def _look(site: TunnelSite, root: SftpRoot) -> Laptop:
    rendezvous_file = RendezvousFile(Path(site.directory), site.name)
    spec = SiteSpec(site, {}, "", os.getuid(), os.getgid())
    session = await open_session(spec, rendezvous_file)

    async def opened() -> SftpSession:
        return session

    shared: SharedSession[SftpSession] = SharedSession(opened)
    try:
        async with asyncio.timeout(SECONDS):
            assert isinstance(session.login, TunnelLogin)
            line = session.login.lines[0]
            shares = await _names(SftpRemote(shared, SftpRoot("/")))
            return Laptop(line.rendezvous, line.is_private, shares, await _obstacle(shared, root))
    except TimeoutError:
        raise TimedOut(
            f"the laptop {site.name} let us in, but does not answer within {SECONDS:g} s"
        ) from None
    finally:
        await session.close()


async def _names(remote: SftpRemote) -> list[str]:
    names = [entry.name async for page in remote.list(b"") for entry in page]
    return [name.decode(errors="backslashreplace") for name in sorted(names)]


async def _obstacle(shared: SharedSession[SftpSession], root: SftpRoot) -> str:
    try:
        await SftpRemote(shared, root).connect()
    except RemoteError as error:
        return error.message
    return ""
