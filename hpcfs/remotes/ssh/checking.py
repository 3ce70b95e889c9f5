"""Finds what a login would do, without one, for `hpcfs check`."""

from __future__ import annotations

import asyncio

from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh.settings import Hop, jump_site, read_hop


def look(site: SshSite) -> list[Hop]:
    """The hosts on the way, the site's own last. Jump hosts of jump hosts are not followed.

    Raises RemoteErrors: what a mount would be told.
    """
    return asyncio.run(_look(site))


async def _look(site: SshSite) -> list[Hop]:
    target = await read_hop(site)
    jumps = [
        await read_hop(jump_site(jump, site), is_behind=number > 0)
        for number, jump in enumerate(target.jumps)
    ]
    return [*jumps, target]
