"""Brings missing blocks into one cache file: each block once, however many readers wait for it.

Fetches run in the nursery that the fetcher was given, so that a reader who gives up does not take
the bytes from the others. What a reader waits for is asked for as urgent; what only runs ahead can
be cancelled again, and is, before anything waits for it to end.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.model.entries import BLOCK_BYTES
from hpcfs.model.errors import RemoteError, RemoteFailure
from hpcfs.protocol.messages import Fetched
from hpcfs.site.tasks import Tasks

log = logging.getLogger(__name__)

PREFETCH_BYTES = 48 * 1024 * 1024
"""What may run ahead of all readers of a mount together. It passes through the memory of the
transfer processes."""
_SMALLEST_SHARE = 1024 * 1024


class BlockSource(Protocol):
    """Where a fetcher's bytes come from (reader.Reader)."""

    @property
    def limit(self) -> int:
        """Where they end, in bytes."""
        ...

    async def fetch(self, offset: int, length: int, *, urgent: bool) -> Fetched:
        """Store a range of bytes in the cache file. Raises RemoteError."""
        ...

    def note_fetched(self, fetched: Fetched) -> None:
        """What was stored counts as present now."""
        ...


class Budget:
    """How many bytes all fetchers of a mount may have under way ahead of their readers."""

    def __init__(self, total: int = PREFETCH_BYTES) -> None:
        self._total = total
        self._busy = 0
        self.share = total
        """Bytes for one reader, who may be new."""

    def begin(self) -> None:
        """A fetcher has something under way."""
        self._count(1)

    def end(self) -> None:
        """That fetcher has nothing under way any more."""
        self._count(-1)

    def _count(self, change: int) -> None:
        self._busy += change
        self.share = max(_SMALLEST_SHARE, self._total // max(1, self._busy))


@dataclass(eq=False)
class BlockFlight:
    """A request under way."""

    blocks: range
    urgent: bool
    waiters: int = 0
    landed: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    error: RemoteError | None = None

    @property
    def can_go(self) -> bool:
        """Whether it only runs ahead, and nobody waits for it."""
        return not self.urgent and not self.waiters


class Fetcher:
    """Brings blocks from `source` into `file`, each in a task of `nursery`."""

    def __init__(
        self, file: CacheFile, source: BlockSource, nursery: Tasks, budget: Budget
    ) -> None:
        self._file = file
        self._source = source
        self._nursery = nursery
        self._budget = budget
        self.flights: dict[int, BlockFlight] = {}
        """What is under way, by block."""
        self._queue: deque[BlockFlight] = deque()
        """Those that did not leave yet."""

    def is_needed(self, block: int) -> bool:
        """Whether the block must come from the source."""
        return block * BLOCK_BYTES < self._source.limit and not self._file.blocks.is_present(block)

    async def ensure(self, blocks: range, most_bytes: int) -> None:
        """Return once all these blocks are in the cache file; raises RemoteError if one can't be.

        A request asks for `most_bytes` at most. When this returns, nothing has been awaited since
        the last check: a caller that reads at once finds the blocks there.
        """
        while waiting := self.start(blocks, most_bytes, urgent=True):
            await self.wait(waiting)

    async def wait(self, flights: Iterable[BlockFlight]) -> None:
        """Return once they have landed; raises RemoteError."""
        for flight in flights:
            flight.waiters += 1
            try:
                await flight.landed.wait()
            finally:
                flight.waiters -= 1
            if flight.error:
                raise flight.error

    def start(self, blocks: Iterable[int], most_bytes: int, *, urgent: bool) -> list[BlockFlight]:
        """The flights that bring the missing ones of `blocks`, newly started ones included.

        A failed prefetch is silent; the next reader of its blocks retries.
        """
        flights: dict[int, BlockFlight] = {}
        missing: list[int] = []
        for block in blocks:
            if not self.is_needed(block):
                continue
            if flight := self.flights.get(block):
                flights[id(flight)] = flight
            else:
                missing.append(block)
        most_blocks = max(1, most_bytes // BLOCK_BYTES)
        launched = [BlockFlight(run, urgent) for run in _runs(missing, most_blocks)]
        self._launch(launched)
        return [*flights.values(), *launched]

    def cancel(self, blocks: range) -> None:
        """Nobody will read these: end what runs ahead for them alone."""
        for flight in self._under_way(blocks):
            inside = blocks.start <= flight.blocks.start and flight.blocks.stop <= blocks.stop
            if flight.can_go and inside:
                flight.scope.cancel()

    def cancel_all(self) -> None:
        """End all that only runs ahead."""
        for flight in self._under_way(None):
            if flight.can_go:
                flight.scope.cancel()

    async def wait_idle(self, blocks: range | None = None) -> None:
        """Return once no fetch of these blocks (of any, if None) is under way: what is written to
        them now won't be overwritten by bytes from the remote."""
        while flights := self._under_way(blocks):
            for flight in flights:
                if flight.can_go:
                    flight.scope.cancel()
            for flight in flights:
                await flight.landed.wait()

    def is_idle(self, blocks: range) -> bool:
        """Whether no fetch of these blocks is under way."""
        return not self._under_way(blocks)

    def _under_way(self, blocks: range | None) -> set[BlockFlight]:
        if blocks is None or len(blocks) > len(self.flights):
            return {
                flight
                for block, flight in self.flights.items()
                if blocks is None or block in blocks
            }
        return {self.flights[block] for block in blocks if block in self.flights}

    def _launch(self, flights: list[BlockFlight]) -> None:
        if not flights:
            return
        if not self.flights:
            self._budget.begin()
        for flight in flights:
            self.flights.update(dict.fromkeys(flight.blocks, flight))
        if not self._queue:
            self._nursery.start_soon(self._fly_in_order)
        self._queue.extend(flights)

    async def _fly_in_order(self) -> None:
        """Requests leave in the order in which they were started; trio would begin tasks of one
        moment in any."""
        try:
            while len(self._queue) > 1:
                await self._nursery.start(self._fly, self._queue.popleft())
        except BaseException:
            while self._queue:
                self._end(self._queue.popleft())
            raise
        await self._fly(self._queue.popleft())

    def _end(self, flight: BlockFlight) -> None:
        for block in flight.blocks:
            self.flights.pop(block, None)
        if not self.flights:
            self._budget.end()
        flight.landed.set()

    async def _fly(
        self, flight: BlockFlight, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        task_status.started()
        offset = flight.blocks.start * BLOCK_BYTES
        length = min(flight.blocks.stop * BLOCK_BYTES, self._source.limit) - offset
        try:
            with flight.scope:
                fetched = await self._source.fetch(offset, length, urgent=flight.urgent)
                self._landed(flight, offset + fetched.length, fetched.checksums)
                self._source.note_fetched(fetched)
        except RemoteError as error:
            flight.error = error
            log.debug("fetch of %d bytes at %d: %s", length, offset, error.message)
        except Exception:
            log.exception("fetch of %d bytes at %d failed in an unexpected way", length, offset)
            flight.error = RemoteFailure("reading failed in an unexpected way; the log has details")
        finally:
            self._end(flight)

    def _landed(self, flight: BlockFlight, end: int, checksums: list[int]) -> None:
        """Mark what came, but for a last block that is longer by now: the file grew meanwhile.

        The checksum of a block that goes on with zeros written here covers only a part of it.
        """
        for block, checksum in zip(flight.blocks, checksums, strict=False):
            stop = (block + 1) * BLOCK_BYTES
            if end >= min(stop, self._source.limit):
                whole = end >= min(stop, self._file.size)
                self._file.blocks.put(block, checksum if whole else 0)


def _runs(blocks: list[int], most: int) -> list[range]:
    """Consecutive numbers as ranges of at most `most`."""
    if not blocks:
        return []
    breaks = [at + 1 for at, (one, other) in enumerate(pairwise(blocks)) if other != one + 1]
    runs = []
    for first, last in pairwise([0, *breaks, len(blocks)]):
        start, stop = blocks[first], blocks[last - 1] + 1
        runs += [range(at, min(at + most, stop)) for at in range(start, stop, most)]
    return runs
