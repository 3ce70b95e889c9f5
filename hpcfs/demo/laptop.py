"""The process that plays the demo's laptop: `python -m hpcfs.demo.laptop DIRECTORY`.

It runs a tunnel as `hpcfs tunnel` does, to the cluster that servers.py serves: it logs in over SSH
and requests reverse forwards, and opens no port of its own. Only the control socket in the user's
runtime directory is left out, where `hpcfs tunnel --status` would find it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from hpcfs.demo import child, sample
from hpcfs.demo.servers import HOST_ALIAS, TUNNEL
from hpcfs.laptop.shares import Share
from hpcfs.laptop.tunnel import Tunnel, TunnelPlan
from hpcfs.model.errors import RemoteError, SetupError
from hpcfs.model.sites import SshSite
from hpcfs.remotes.base import NO_PROMPTER


async def serve(directory: Path) -> None:
    """Run the tunnel until stdin ends or SIGTERM arrives. Raises SetupError where it fails."""
    stop = await child.stopped()
    home = directory / "laptop"
    sample.write_laptop(home)
    plan = TunnelPlan(
        name=TUNNEL,
        site=SshSite(HOST_ALIAS, ssh_config=str(directory / "ssh_config")),
        shown=HOST_ALIAS,
        shares=(Share("data", home / "data"), Share("code", home / "src", read_only=True)),
    )
    stands = asyncio.Event()
    tunnel = Tunnel(plan, NO_PROMPTER, stands.set)  # the keys need no passphrase
    running = asyncio.create_task(tunnel.run())
    ending = asyncio.create_task(stop.read())
    standing = asyncio.create_task(stands.wait())
    await asyncio.wait([running, standing, ending], return_when=asyncio.FIRST_COMPLETED)
    if standing.done():
        child.report()
        await asyncio.wait([running, ending], return_when=asyncio.FIRST_COMPLETED)
    standing.cancel()
    ending.cancel()
    tunnel.stop()
    try:
        await running
    except RemoteError as error:
        raise SetupError(f"the demo's laptop: {error.message}") from error


if __name__ == "__main__":
    child.run(serve)
