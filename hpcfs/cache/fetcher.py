"""Brings missing blocks into one cache file: each block once, however many readers wait for it.

The fetcher knows of the remote only the callable that fetches a range. Its fetches run in the
nursery it was given, so that a reader who gives up does not take the bytes from the others.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import trio

from hpcfs.cache.file import CacheFile
from hpcfs.transfer.messages import BLOCK_BYTES, Fetched, RemoteError, RemoteFailure

log = logging.getLogger(__name__)

MAX_FETCH_BLOCKS = 16
"""4 MiB a request: enough to fill a pipe with a few, small enough that a reader of its first block
does not wait long."""

FetchRange = Callable[[int, int], Awaitable[Fetched]]
"""(offset, length) -> what is now in the cache file; raises RemoteError."""


@dataclass(eq=False)
class _Flight:
    """A request under way."""

    blocks: range
    landed: trio.Event = field(default_factory=trio.Event)
    error: RemoteError | None = None


class Fetcher:
    """`is_needed` tells whether a block must come from the remote; `limit` is where the remote's
    bytes end; `on_fetched` hears how many bytes came."""

    def __init__(
        self,
        file: CacheFile,
        fetch: FetchRange,
        is_needed: Callable[[int], bool],
        limit: Callable[[], int],
        on_fetched: Callable[[int], None],
        nursery: trio.Nursery,
    ) -> None:
        self._file = file
        self._fetch = fetch
        self._is_needed = is_needed
        self._limit = limit
        self._on_fetched = on_fetched
        self._nursery = nursery
        self._flights: dict[int, _Flight] = {}

    async def ensure(self, blocks: range) -> None:
        """Return once all these blocks are in the cache file; raises RemoteError if one can't be.

        When it returns, nothing has been awaited since the last check: a caller that reads at once
        finds the blocks there.
        """
        while waiting := self._start(blocks):
            for flight in waiting:
                await flight.landed.wait()
                if flight.error:
                    raise flight.error

    def prefetch(self, blocks: range) -> None:
        """Start to fetch these, as far as they are missing; errors are for who needs the blocks."""
        self._start(blocks)

    async def settle(self, blocks: range | None = None) -> None:
        """Return once no fetch of these blocks (of any, if None) is under way: what is written to
        them now won't be overwritten by bytes from the remote."""
        while flights := self._under_way(blocks):
            for flight in flights:
                await flight.landed.wait()

    def is_idle(self, blocks: range | None) -> bool:
        """Whether no fetch of these blocks (of any, if None) is under way."""
        return not self._under_way(blocks)

    def _under_way(self, blocks: range | None) -> set[_Flight]:
        if blocks is None or len(blocks) > len(self._flights):
            return {
                flight
                for block, flight in self._flights.items()
                if blocks is None or block in blocks
            }
        return {self._flights[block] for block in blocks if block in self._flights}

    def _start(self, blocks: Iterable[int]) -> list[_Flight]:
        """The flights that bring the missing ones of `blocks`, newly started ones included."""
        flights: dict[int, _Flight] = {}
        run: list[int] = []
        for block in blocks:
            if not self._is_needed(block):
                continue
            if flight := self._flights.get(block):
                flights[id(flight)] = flight
                continue
            if run and (block != run[-1] + 1 or len(run) == MAX_FETCH_BLOCKS):
                launched = self._launch(run)
                flights[id(launched)] = launched
                run = []
            run.append(block)
        if run:
            launched = self._launch(run)
            flights[id(launched)] = launched
        return list(flights.values())

    def _launch(self, run: list[int]) -> _Flight:
        flight = _Flight(range(run[0], run[-1] + 1))
        for block in flight.blocks:
            self._flights[block] = flight
        self._nursery.start_soon(self._fly, flight)
        return flight

    async def _fly(self, flight: _Flight) -> None:
        offset = flight.blocks.start * BLOCK_BYTES
        length = min(flight.blocks.stop * BLOCK_BYTES, self._limit()) - offset
        try:
            fetched = await self._fetch(offset, length)
        except RemoteError as error:
            flight.error = error
            log.debug("fetch of %d bytes at %d: %s", length, offset, error.message)
        except Exception:
            log.exception("fetch of %d bytes at %d failed in an unexpected way", length, offset)
            flight.error = RemoteFailure("reading failed in an unexpected way; the log has details")
        else:
            self._landed(flight, offset + fetched.length, fetched.checksums)
            self._on_fetched(fetched.length)
        finally:
            for block in flight.blocks:
                self._flights.pop(block, None)
            flight.landed.set()

    def _landed(self, flight: _Flight, end: int, checksums: list[int]) -> None:
        """Mark what came, but for a last block that is longer by now: the file grew meanwhile.

        The checksum of a block that goes on with zeros written here covers only a part of it.
        """
        for block, checksum in zip(flight.blocks, checksums, strict=False):
            stop = (block + 1) * BLOCK_BYTES
            if end >= min(stop, self._limit()):
                whole = end >= min(stop, self._file.size)
                self._file.blocks.put(block, checksum if whole else 0)
