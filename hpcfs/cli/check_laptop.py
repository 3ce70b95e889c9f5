"""Checks a namespace of a laptop, from the cluster.

The check connects as a mount does: no server bans for a connection to a tunnel, and no question is
asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpcfs.cli.findings import Finding
from hpcfs.model.errors import RemoteError
from hpcfs.model.sites import SftpRoot, TunnelSite
from hpcfs.tunnel import file as rendezvous


def laptop_namespace(subject: str, site: TunnelSite, root: SftpRoot) -> Iterator[Finding]:
    """Connect to the tunnel, and check that the share is there."""
    from hpcfs.remotes.tunnel import checking  # imports asyncssh

    try:
        found = checking.look(site, root)
    except RemoteError as error:
        yield Finding("fail", subject, f"{error.message}{_left(site)}")
        return
    who = found.rendezvous
    way = "a socket that only you can open" if found.is_private else "a port, with SSH behind it"
    yield Finding(
        "ok",
        subject,
        f"{who.user} on {who.laptop} answers, through {who.login_host} since {who.since}: {way}",
    )
    shared = ", ".join(found.shares) or "nothing"
    if found.obstacle:
        yield Finding("fail", subject, f"{found.obstacle}: correct path, it shares {shared}")
    else:
        yield Finding("ok", subject, f"it shares {shared}")


def _left(site: TunnelSite) -> str:
    """Return which tunnels have a file, if the one of that name has none."""
    directory = Path(site.directory)
    if rendezvous.stamp(directory, site.name) is not None:
        return ""
    names = ", ".join(rendezvous.names(directory)) or "none"
    return f" (tunnels in {directory}: {names})"
