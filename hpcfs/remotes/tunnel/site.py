"""The laptop as a site: a connection that is there whenever the laptop is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec

from hpcfs.model.errors import RemoteError
from hpcfs.model.sites import SiteSpec, TunnelSite
from hpcfs.model.usage import Traffic
from hpcfs.remotes.sftp.remote import SftpSite
from hpcfs.remotes.sftp.session import SftpSession
from hpcfs.remotes.ssh.shared_session import SharedSession
from hpcfs.remotes.tunnel.line import RendezvousFile
from hpcfs.remotes.tunnel.session import open_session
from hpcfs.tunnel.file import Stamp

PAUSE_SECONDS = 1.0
"""Between attempts, each of which is a look at a file and a connection on this machine or its
network: nobody bans for that."""


class TunnelSiteConnection(SftpSite):
    """All namespaces behind one tunnel, connected whenever the laptop is there."""

    def __init__(self, spec: SiteSpec):
        assert isinstance(spec.site, TunnelSite)
        self._rendezvous_file = RendezvousFile(Path(spec.site.directory), spec.site.name)
        self._spec = spec
        self._tried: Stamp | None = None
        super().__init__(spec, SharedSession(self._open), is_virtual=True)
        self._tending = asyncio.create_task(self._shared.tend(self._worth_trying))

    async def _open(self) -> SftpSession:
        self._tried = self._rendezvous_file.stamp()
        return await open_session(self._spec, self._rendezvous_file)

    async def _worth_trying(self, failure: RemoteError) -> None:
        """Wait until another attempt is worth while: what the file's keys or its owner forbid is
        not tried again before it is another file."""
        if failure.lasting:
            await self._rendezvous_file.changed(self._tried, PAUSE_SECONDS)
            return
        try:
            async with asyncio.timeout(PAUSE_SECONDS):
                await self._rendezvous_file.changed(self._tried)
        except TimeoutError:
            return

    def traffic(self) -> Traffic:
        """Return what is open now, and why there is no connection where there is none."""
        return msgspec.structs.replace(super().traffic(), away=self._shared.away)

    async def close(self) -> None:
        """Stop looking for the laptop and close all connections."""
        self._tending.cancel()
        await asyncio.wait([self._tending])
        await super().close()
