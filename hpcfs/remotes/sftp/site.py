"""An SSH login and its namespaces: a connection that is there when it is used."""

from __future__ import annotations

import asyncio

from hpcfs.model.errors import WrongSettings
from hpcfs.model.sites import SiteSpec, SshSite
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.sftp.remote import SftpSite
from hpcfs.remotes.sftp.session import open_session
from hpcfs.remotes.ssh.offer import LoginOffer
from hpcfs.remotes.ssh.shared_session import SharedSession


class SshSiteConnection(SftpSite):
    """All namespaces behind one SSH login. An idle connection is closed, unless the user would be
    asked for the next one."""

    def __init__(self, spec: SiteSpec, prompter: Prompter):
        if not isinstance(spec.site, SshSite):
            raise WrongSettings("an SSH site was expected")
        offer = LoginOffer(spec.site)
        super().__init__(
            spec,
            SharedSession(lambda: open_session(spec, prompter, offer), offers_else=offer.is_else),
        )
        self._idle_seconds = spec.site.idle_timeout
        self._is_doubtful = asyncio.Event()
        self._tasks = [asyncio.create_task(self._check()), asyncio.create_task(self._close_idle())]

    def network_changed(self) -> None:
        """Check the connection at once (see `Site.network_changed`)."""
        self._is_doubtful.set()

    async def _check(self) -> None:
        """Check once for changes that come together."""
        while True:
            await self._is_doubtful.wait()
            self._is_doubtful.clear()
            await self._shared.check()

    async def _close_idle(self) -> None:
        wait = self._idle_seconds
        while True:
            await asyncio.sleep(wait)
            wait = await self._shared.close_if_idle(self._idle_seconds)

    async def close(self) -> None:
        """Give up what is under way and close all connections."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await super().close()
