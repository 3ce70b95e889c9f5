"""Opens a site: the one place that knows which kinds of remote there are.

A remote can be used in any asyncio program::

    site = open_site(SiteSpec(SshSite("cluster"), {"home": SftpRoot("~")}, state_dir, uid, gid))
    try:
        remote = site.remote("home")
        await remote.connect()
        entry = await remote.stat(b"results.csv")
    finally:
        await site.close()

Each kind is imported when it is first opened: its library takes a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Callable

from hpcfs.model.sites import AnySite, S3Site, SiteSpec, SshSite, TunnelSite
from hpcfs.remotes.base import NO_PROMPTER, Prompter, Site


def open_site(spec: SiteSpec, prompter: Prompter = NO_PROMPTER) -> Site:
    """The site that `spec` describes; the caller closes it.

    Called in a running event loop. Nothing is connected before the first request (tunnels: before
    the loop runs next), so no RemoteError is raised here. `prompter` asks the user for passwords
    and unknown host keys; without one, a login that needs an answer is refused.
    """
    return _KINDS[type(spec.site)](spec, prompter)


def _open_ssh(spec: SiteSpec, prompter: Prompter) -> Site:
    from hpcfs.remotes.sftp.site import SshSiteConnection

    return SshSiteConnection(spec, prompter)


def _open_tunnel(spec: SiteSpec, prompter: Prompter) -> Site:
    from hpcfs.remotes.tunnel.site import TunnelSiteConnection

    return TunnelSiteConnection(spec)


def _open_s3(spec: SiteSpec, prompter: Prompter) -> Site:
    from hpcfs.remotes.s3.site import S3SiteConnection

    return S3SiteConnection(spec)


_KINDS: dict[type[AnySite], Callable[[SiteSpec, Prompter], Site]] = {
    SshSite: _open_ssh,
    TunnelSite: _open_tunnel,
    S3Site: _open_s3,
}
