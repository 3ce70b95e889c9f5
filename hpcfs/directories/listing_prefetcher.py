"""Lists directories ahead of a program that walks a tree, as walk_predictor.py says.

They go by path, for their directories may have no node yet. Whatever is changed here in or above
such a directory drops what was listed of it; so does the end of the walk, a second of age, and
another way taken by the program. One that fails is no program's error: opening the directory
asks again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import trio

from hpcfs.directories.listing import Listing
from hpcfs.directories.walk_predictor import MOST_HELD, Found, WalkPredictor, WalkPredictors
from hpcfs.inodes.tree import ATTRIBUTE_SECONDS
from hpcfs.model import paths
from hpcfs.model.entries import Entry
from hpcfs.model.errors import FilesystemError, RemoteError
from hpcfs.site.namespace import Namespace
from hpcfs.site.tasks import Tasks

log = logging.getLogger(__name__)

MAX_BYTES = 4 * 1024 * 1024
"""Encoded listings that are held and not used yet."""
EXPIRE_SECONDS = 0.25
NEXT = 2
"""Directories whose entries are told before the program reads them."""

OnNext = Callable[[Namespace, bytes, Iterable[Entry], float], None]
"""(namespace, directory, its entries, when the remote was asked for them)"""


class Flight:
    """A directory's listing, under way or complete, made for a `walk`."""

    def __init__(self, namespace: Namespace, walk: WalkPredictor, listing: Listing) -> None:
        self.namespace = namespace
        self.walk = walk
        self.listing = listing
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.error: RemoteError | FilesystemError | None = None
        self.taken = False
        """A program waits for it, or has it."""
        self.is_news = True
        """Nobody was told yet that the program comes to it next."""
        self.useless = False
        """Failed, or too large to be kept. Not tried again while the walk would come by here."""

    def found(self, now: float) -> Found:
        """Return what a program would find of it at `now`."""
        if self.useless:
            return Found.NOTHING
        if not self.ended.is_set():
            return Found.UNDER_WAY
        return Found.READY if now - self.listing.asked <= ATTRIBUTE_SECONDS else Found.NOTHING

    async def result(self) -> None:
        """Return once it is complete. Raises RemoteError and FilesystemError."""
        await self.ended.wait()
        if self.error is not None:
            raise self.error

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        return 0 if self.useless else self.listing.size

    def give_up(self) -> None:
        """Cancel it and drop what has come."""
        self.useless = True
        self.scope.cancel()
        self.listing.release()


class ListingPrefetcher:
    """Lists directories before programs come to them, and holds the listings until then.

    `number` is the inode number of a path; `on_next` is called for directories that a program will
    come to next, once they are listed.
    """

    def __init__(
        self,
        new_listing: Callable[[], Listing],
        number: Callable[[bytes], int],
        now: Callable[[], float],
        on_next: OnNext,
        nursery: Tasks,
    ) -> None:
        self._on_next = on_next
        self._new_listing = new_listing
        self._now = now
        self._nursery = nursery
        self._walks = WalkPredictors(number)
        self.flights: dict[bytes, Flight] = {}
        """Listings under way or not used yet, by namespace and path."""
        self._is_expiring = False

    # --- what programs do -------------------------------------------------------------------------

    def opened(self, namespace: Namespace, path: bytes) -> tuple[WalkPredictor, Flight | None]:
        """Take what is there of the listing of a directory that a program reads, and ask for what
        it will read next."""
        key, now = key_of(namespace, path), self._now()
        flight = self.flights.pop(key, None)
        found = flight.found(now) if flight is not None else Found.NOTHING
        walk = self._walks.opened(key, found, self.flights, now)
        if found is Found.NOTHING:
            flight = None
            self._drop_unwanted(walk)
        if flight is not None:
            flight.taken = True
        self._ask(namespace, walk)
        return walk, flight

    def is_ready(self, namespace: Namespace, path: bytes) -> bool:
        """Whether the listing of this directory is complete and still believed."""
        if not self.flights:
            return False
        flight = self.flights.get(key_of(namespace, path))
        return flight is not None and flight.found(self._now()) is Found.READY

    def closed(self, walk: WalkPredictor) -> None:
        """End what `opened` began: the program has its listing, or an error."""
        walk.answered(self._now())

    def listed(
        self, namespace: Namespace, path: bytes, walk: WalkPredictor, listing: Listing
    ) -> None:
        """Take note of a listing; its subdirectories may come next."""
        walk.listed(key_of(namespace, path), listing.walkable, self._now() - listing.asked)
        self._ask(namespace, walk)

    def changed(self, namespace: Namespace, path: bytes, name: bytes, *, below: bool) -> None:
        """Drop the listing of a directory that was changed here; with `below`, those below `name`
        too."""
        key = key_of(namespace, path)
        self._drop(key)
        if below:
            inside = paths.join(key, name)
            for other in [k for k in self.flights if paths.is_below(k, inside)]:
                self._drop(other)

    # --- listings -------------------------------------------------------------------------------

    def _ask(self, namespace: Namespace, walk: WalkPredictor) -> None:
        has_room = self._size < MAX_BYTES
        wanted = walk.wanted()
        for key in wanted:
            if has_room and len(self.flights) < MOST_HELD and key not in self.flights:
                flight = self.flights[key] = Flight(namespace, walk, self._new_listing())
                self._nursery.start_soon(self._fly, key, flight)
        self._tell_of_next(namespace, wanted[:NEXT])
        if self.flights and not self._is_expiring:
            self._is_expiring = True
            self._nursery.start_soon(self._expire_regularly)

    def _tell_of_next(self, namespace: Namespace, keys: Sequence[bytes]) -> None:
        """Tell which directories the program reads next, and what is in them if that is known."""
        for key in keys:
            flight = self.flights.get(key)
            if flight is not None and flight.is_news and flight.found(self._now()) is Found.READY:
                flight.is_news = False
                entries = [entry for _, entry in flight.listing.entries_from(0)]
                self._on_next(namespace, key.partition(b"/")[2], entries, flight.listing.asked)

    async def _fly(self, key: bytes, flight: Flight) -> None:
        path = key.partition(b"/")[2]
        is_complete = False
        with flight.scope:
            try:
                await flight.namespace.list_pages(path, partial(self._add_page, flight))
                flight.listing.check_complete()
                is_complete = True
            except (RemoteError, FilesystemError) as error:
                flight.error = error
        flight.ended.set()
        if flight.taken or self.flights.get(key) is not flight:
            return
        if is_complete:
            self.listed(flight.namespace, path, flight.walk, flight.listing)
        else:
            log.debug("%r was not listed ahead: %s", key, flight.error or "it is too large")
            flight.give_up()

    def _add_page(self, flight: Flight, page: bytes) -> None:
        if flight.useless or flight.scope.cancel_called:
            return  # what was on its way when it was given up
        flight.listing.add_page(page)
        if not flight.taken and (not flight.listing.is_small or self._size > MAX_BYTES):
            flight.give_up()

    @property
    def _size(self) -> int:
        return sum(flight.size for flight in self.flights.values())

    def _drop(self, key: bytes) -> None:
        flight = self.flights.pop(key, None)
        if flight is not None:
            flight.give_up()

    def _drop_unwanted(self, walk: WalkPredictor) -> None:
        wanted = set(walk.wanted())
        for key, flight in list(self.flights.items()):
            if flight.walk is walk and key not in wanted:
                self._drop(key)

    async def _expire_regularly(self) -> None:
        while self.flights:
            await trio.sleep(EXPIRE_SECONDS)
            self._expire()
        self._is_expiring = False

    def _expire(self) -> None:
        now = self._now()
        wasteful: set[WalkPredictor] = set()
        for key, flight in list(self.flights.items()):
            old = flight.ended.is_set() and now - flight.listing.asked > ATTRIBUTE_SECONDS
            if old or flight.walk.is_quiet(now):
                self._drop(key)
                wasteful.add(flight.walk)
        for walk in wasteful:
            walk.wasted()


def key_of(namespace: Namespace, path: bytes) -> bytes:
    """Return the path with its namespace before it."""
    return paths.join(namespace.name.encode(), path)
