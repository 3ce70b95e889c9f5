"""Before the mount ends: who waits for a remote that does not answer is let go.

Otherwise a program that is stuck in close(2) would keep the mount busy, and the daemon alive, for
as long as the patience lasts. What it wrote is in the journal.
"""

from __future__ import annotations

import logging

import trio

from hpcfs.kernel.requests import KernelRequests
from hpcfs.site.namespace import Namespace
from hpcfs.writeback.close import Closer

log = logging.getLogger(__name__)

SILENCE_SECONDS = 4.0
"""For which a remote may leave everything unanswered while the mount is to end."""


async def let_go(requests: KernelRequests, closer: Closer) -> int:
    """Give up the namespaces for which somebody or something waits, and that do not answer; return
    how many requests of programs were let go."""
    wanted = requests.namespaces() | {content.namespace for content in closer.dirty()}
    count = 0

    async def look(namespace: Namespace) -> None:
        nonlocal count
        held = requests.held_by(namespace)
        if await namespace.give_up_if_silent(SILENCE_SECONDS):
            log.info("%s does not answer: nobody waits for it any more", namespace.name)
            requests.give_up(namespace)
            count += held

    async with trio.open_nursery() as nursery:
        for namespace in wanted:
            nursery.start_soon(look, namespace)
    return count
