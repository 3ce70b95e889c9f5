"""Builds the parts of a mount from its settings: the only place that assembles them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import trio

from hpcfs.cache.store import Store
from hpcfs.config.config import Settings
from hpcfs.config.values import BandwidthLimit
from hpcfs.filesystem.filesystem import Filesystem, MountOptions
from hpcfs.model.sites import (
    AnyRoot,
    AnySite,
    S3Root,
    S3Site,
    SftpRoot,
    SiteSpec,
    SshSite,
    TunnelSite,
)
from hpcfs.protocol.messages import Start
from hpcfs.site.bandwidth import Bandwidth
from hpcfs.site.calls import PatientCalls
from hpcfs.site.client import Ask, SiteClient
from hpcfs.site.namespace import Namespace, NamespacePolicy
from hpcfs.site.patience import Patience
from hpcfs.site.tasks import Tasks
from hpcfs.writeback.journal import Journal
from hpcfs.writeback.pending import Pending
from hpcfs.writeback.recovery import Recovery
from hpcfs.writeback.uploader import Uploader


@dataclass(frozen=True)
class Mount:
    """The parts of one mount; its kernel side is not among them."""

    store: Store
    journal: Journal
    sites: Mapping[AnySite, SiteClient]
    namespaces: Sequence[Namespace]
    fs: Filesystem
    recovery: Recovery
    pending: Pending

    @property
    def origins(self) -> dict[str, str]:
        """The remote folders by namespace, as the cache names them."""
        return {namespace.name: namespace.origin for namespace in self.namespaces}


def assemble(settings: Settings, store: Store, journal: Journal, ask: Ask, nursery: Tasks) -> Mount:
    """Build a mount on an open cache and journal; nothing is started.

    Its tasks run in the nursery. `ask` answers the questions of its sites, in a thread.
    """
    sites = {
        spec.site: SiteClient(
            Start(spec, settings.log_level), settings.log_file, nursery, store.in_memory, ask
        )
        for spec in _site_specs(settings)
    }
    namespaces = _namespaces(settings, sites, nursery)
    options = MountOptions(
        single=settings.root_namespace is not None,
        mountpoint=os.fsencode(settings.mountpoint),
        journal_size=settings.journal_size,
    )
    fs = Filesystem(namespaces, store, Uploader(journal), nursery, options)
    recovery = Recovery(fs.tree, fs.shared, fs.closer.queue, journal, namespaces)
    pending = Pending(fs.tree, store, fs.closer, journal, recovery)
    return Mount(store, journal, sites, namespaces, fs, recovery, pending)


def _namespaces(
    settings: Settings, sites: Mapping[AnySite, SiteClient], nursery: Tasks
) -> list[Namespace]:
    """Namespaces of one site share its connection, and so its bandwidth."""
    bandwidths = {site: Bandwidth() for site in sites}
    return [
        Namespace(
            chosen.name,
            _origin(chosen.site, chosen.root),
            PatientCalls(
                sites[chosen.site],
                chosen.name,
                Patience(chosen.patience, trio.current_time),
                nursery,
                waits_itself=isinstance(chosen.site, TunnelSite),
            ),
            NamespacePolicy(
                read_only=chosen.read_only,
                write=chosen.write,
                keeps_xattrs=chosen.keeps_xattrs,
                symlinks=chosen.symlinks,
            ),
            bandwidths[chosen.site],
        )
        for chosen in settings.namespaces.values()
    ]


def _site_specs(settings: Settings) -> list[SiteSpec]:
    """Return one for each login; namespaces of one site share its connection."""
    roots: dict[AnySite, dict[str, AnyRoot]] = {}
    for namespace in settings.namespaces.values():
        roots.setdefault(namespace.site, {})[namespace.name] = namespace.root
    uid, gid, directory = os.getuid(), os.getgid(), str(settings.cache_dir)
    return [
        SiteSpec(site, its_roots, directory, uid, gid, *_limit(settings, site))
        for site, its_roots in roots.items()
    ]


def _limit(settings: Settings, site: AnySite) -> BandwidthLimit:
    """Return the lowest limits of the site's namespaces: they share its link."""
    limits = [one.bandwidth_limit for one in settings.namespaces.values() if one.site == site]
    down = min((one.down for one in limits if one.down), default=0)
    return BandwidthLimit(down, min((one.up for one in limits if one.up), default=0))


def _origin(site: AnySite, root: AnyRoot) -> str:
    """Name a remote folder across mounts, whatever the namespace is called."""
    if isinstance(site, SshSite) and isinstance(root, SftpRoot):
        return f"ssh:{site.user or ''}@{site.host}:{site.port or ''}:{root.path}"
    if isinstance(site, TunnelSite) and isinstance(root, SftpRoot):
        return f"tunnel:{site.name}:{root.path}"
    assert isinstance(site, S3Site)
    assert isinstance(root, S3Root)
    return f"s3:{site.endpoint_url or 'aws'}:{root.bucket}/{root.prefix}"
