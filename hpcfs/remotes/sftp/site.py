"""An SSH login and its namespaces: a connection that is there when it is used."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine

from hpcfs.model.errors import WrongSettings
from hpcfs.model.sites import SiteSpec, SshSite
from hpcfs.remotes import machine_changes
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.machine_changes import MachineChange
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
        self._tasks: set[asyncio.Task[None]] = set()
        self._begin(self._watch_machine())
        self._begin(self._close_idle())

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _watch_machine(self) -> None:
        async with machine_changes.watched(self._changed):
            await asyncio.Event().wait()

    def _changed(self, change: MachineChange) -> None:
        self._begin(self._shared.check())

    async def _close_idle(self) -> None:
        wait = self._idle_seconds
        while True:
            await asyncio.sleep(wait)
            wait = await self._shared.close_if_idle(self._idle_seconds)

    async def close(self) -> None:
        """Give up what is under way and close all connections."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await super().close()
