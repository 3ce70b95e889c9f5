"""The status of a mount, as `hpcfs status` shows it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from hpcfs import __version__
from hpcfs.config.config import Settings
from hpcfs.control.control import MountStatus, NamespaceStatus, PendingList, SiteStatus
from hpcfs.daemon.assembly import Mount
from hpcfs.model.sites import AnySite, S3Site, SshSite, TunnelSite
from hpcfs.model.usage import Traffic
from hpcfs.site.client import SiteClient

_KINDS = {SshSite: "sftp", S3Site: "s3", TunnelSite: "tunnel"}


class StatusReporter:
    """Reports on a mount that was started just now; `summary` tells what is not uploaded yet.

    `resumed_files` is how many files an earlier mount had not uploaded.
    """

    def __init__(
        self, settings: Settings, mount: Mount, summary: Callable[[], PendingList]
    ) -> None:
        self._settings = settings
        self._mount = mount
        self._summary = summary
        self._started = time.time()
        self.resumed_files = 0

    def status(self) -> MountStatus:
        """Return what the daemon knows by itself; nobody is asked."""
        settings, mount = self._settings, self._mount
        pending = self._summary()
        return MountStatus(
            mountpoint=str(settings.mountpoint),
            pid=os.getpid(),
            version=__version__,
            started=self._started,
            log_file=str(settings.log_file),
            cache_dir=str(settings.cache_dir),
            cache_used=mount.store.used_bytes,
            cache_size=settings.cache_size,
            open_files=mount.fs.files.open_count,
            dirty_files=len(mount.fs.closer.dirty()),
            namespaces=[self._namespace_status(name) for name in settings.namespaces],
            pending=pending.files,
            pending_files=pending.count,
            pending_bytes=pending.left,
            pending_states=pending.states,
            uploaded_bytes=sum(namespace.uploaded.total for namespace in mount.namespaces),
            upload_rate=sum(namespace.uploaded.rate() for namespace in mount.namespaces),
            memory=self._memory(),
            notices=list(mount.fs.closer.notices),
            resumed_files=self.resumed_files,
            root_namespace=settings.root_namespace,
            troubles=mount.store.troubles.sentences,
        )

    async def live_status(self) -> MountStatus:
        """Return the status with what only the transfer processes know, where they answer."""
        found: dict[AnySite, Traffic] = {}

        async def ask(key: AnySite, site: SiteClient) -> None:
            traffic = await site.traffic()
            if traffic is not None:
                found[key] = traffic

        sites = self._mount.sites
        async with trio.open_nursery() as nursery:
            for key, site in sites.items():
                nursery.start_soon(ask, key, site)
        statuses = [self._site_status(key, found[key]) for key in sites if key in found]
        return msgspec.structs.replace(self.status(), sites=statuses)

    def _site_status(self, key: AnySite, now: Traffic) -> SiteStatus:
        names = [name for name, chosen in self._settings.namespaces.items() if chosen.site == key]
        return SiteStatus(names, _KINDS[type(key)], now.connections, now.channels, now.requests)

    def _namespace_status(self, name: str) -> NamespaceStatus:
        chosen = self._settings.namespaces[name]
        site = self._mount.sites[chosen.site]
        state, reason = site.namespace_state(name)
        return NamespaceStatus(
            name,
            _KINDS[type(chosen.site)],
            chosen.url,
            state,
            reason,
            chosen.read_only,
            chosen.write,
            site.needs_login(name),
        )

    def _memory(self) -> int:
        """Resident bytes of the daemon and its transfer processes."""
        pids = [os.getpid(), *(site.pid for site in self._mount.sites.values() if site.pid)]
        return sum(_resident_bytes(pid) for pid in pids)


def _resident_bytes(pid: int) -> int:
    """proc_pid_statm(5): the second number, in pages."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0  # it just ended
    return pages * os.sysconf("SC_PAGE_SIZE")
