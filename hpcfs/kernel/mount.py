"""One mount towards the kernel, from its beginning to its end."""

from __future__ import annotations

import pyfuse3
import trio

from hpcfs.filesystem.filesystem import Filesystem
from hpcfs.kernel import handshake
from hpcfs.kernel.callers import Callers
from hpcfs.kernel.operations import KernelOperations
from hpcfs.kernel.requests import SHARE, KernelRequests


class KernelMount:
    """One mount: it answers the kernel's requests with `filesystem` until it is unmounted."""

    def __init__(self, filesystem: Filesystem) -> None:
        self.requests = KernelRequests(
            Callers(), share=min(SHARE, handshake.most_background() // 2)
        )
        self._operations = KernelOperations(filesystem, self.requests)
        self._handshake: handshake.Handshake

    def mount(self, mountpoint: str) -> None:
        """Mount the filesystem. Raises RuntimeError when the kernel or fusermount3 refuses."""
        options = set(pyfuse3.default_options)
        options.discard("default_permissions")  # cluster groups are unknown here: remotes decide
        options.add("fsname=hpcfs")
        options.add("subtype=hpcfs")
        device = handshake.opened_device(
            lambda: pyfuse3.init(self._operations, mountpoint, options)
        )
        self._handshake = handshake.Handshake(device)

    async def serve(self, max_requests: int) -> None:
        """Answer the kernel until unmounted; at most `max_requests` at once."""
        await self._handshake.carry_out(lambda: pyfuse3.main(max_tasks=1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.requests.watch)
            await pyfuse3.main(max_tasks=max_requests)
            nursery.cancel_scope.cancel()

    def stop(self) -> None:
        """Make `serve` return once all requests are answered."""
        pyfuse3.terminate()

    def unmount(self) -> None:
        """Unmount, and close the connection to the kernel."""
        pyfuse3.close(unmount=True)
