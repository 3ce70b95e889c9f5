"""Calls that outlast an outage: repeated where that is safe, resolved by looking where it is not.

Between the filesystem and site/client.py. A call that fails for want of a connection waits until
the namespace answers again, and is made again, within the patience (site/patience.py) with it. A
request whose answer was lost may have been carried out: then the second answer is judged by what
the remote has now. Uploads are repeated by writeback/uploader.py, which knows what has changed.
"""

from __future__ import annotations

import logging
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar, cast

import msgspec
import trio

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Entry
from hpcfs.model.errors import (
    AccessRefused,
    AlreadyExists,
    HostKeyRefused,
    NotConnected,
    NotFound,
    RemoteError,
    Throttled,
    TimedOut,
    Unreachable,
)
from hpcfs.protocol import messages as m
from hpcfs.site.client import CALL_TIMEOUT, SiteClient
from hpcfs.site.namespace import Delivery
from hpcfs.site.patience import Patience, Reachability
from hpcfs.site.tasks import Tasks

log = logging.getLogger(__name__)
T = TypeVar("T")

LOOK_SECONDS = 10.0
"""For the answer to a look for a namespace. A question to the user stops this clock."""
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 1.0
"""Between the attempts of one call to a namespace that answers others, in seconds."""
STOPPED_SECONDS = 2.0
"""A clock that runs so late shows that this process was stopped: then nobody was listening."""
MOST_PAGES_AGAIN = 20
"""A listing that breaks off later is an error. A page has 1,000 entries (model/entries.py)."""
_entries = msgspec.msgpack.Decoder(list[Entry])
_ASKED_AT_ONCE = (m.Connect, m.Release)
"""A login has deadlines of its own, as somebody may be looking for a token; and a handle is given
back whatever the remote does. Neither is repeated."""
_MADE_AGAIN_BY_OTHERS = (m.Upload, m.GetDiskUsage)
"""Pieces are not made again at all: with the connection the remote loses those before, and the
upload at the close brings all."""
_ANSWERED_HERE = (m.Release, m.StatOpen)
"""The worker process may answer these by itself."""


class PatientCalls:
    """The calls to one namespace of a site; satisfies SiteCalls (site/namespace.py).

    `waits_itself`: the worker process waits for the remote's return by itself, so NotConnected is
    its last word. What looks for a lost namespace runs in the nursery.
    """

    def __init__(
        self,
        site: SiteClient,
        namespace: str,
        patience: Patience,
        nursery: Tasks,
        *,
        waits_itself: bool = False,
    ) -> None:
        self._site = site
        self._namespace = namespace
        self._patience = patience
        self._nursery = nursery
        self._waits_itself = waits_itself
        self._scopes: set[trio.CancelScope] = set()
        """Of the calls that wait for an answer."""
        self._changed = trio.Event()
        """Set, and made anew, when the namespace answers again or is given up."""
        self._is_watched = False
        self._is_looked_for = False
        self._refused = False

    @property
    def is_away(self) -> bool:
        """Whether calls fail at once: it was silent for too long, or refuses the login."""
        return self._refused or self._patience.state is Reachability.AWAY

    @property
    def failing(self) -> str:
        """Why there is no answer now; empty while there is."""
        is_there = self._patience.state is Reachability.ANSWERING
        return "" if is_there else self._patience.reason

    @property
    def patience(self) -> float:
        """For how many seconds an outage is only a pause."""
        return self._patience.seconds

    async def give_up_if_silent(self, seconds: float) -> bool:
        """Return whether nothing is heard of the namespace for so long, though it is asked. Then it
        counts as away: all calls that wait for it fail."""
        began = trio.current_time()
        if self.is_away:
            return True
        with trio.move_on_after(seconds):
            while not await self._answers():  # noqa: ASYNC110 - nobody tells of it
                await trio.sleep(FIRST_PAUSE)
            return False
        if self._patience.was_heard_since(began) or self._site.asked_within(seconds):
            return False
        self._patience.give_up(self._patience.reason or f"no answer within {seconds:g} s")
        self._end_waiting()
        return True

    async def _answers(self) -> bool:
        """Whether it answers a question of ours, which is made once, whatever it says."""
        try:
            await self._site.call(self._namespace, m.Stat(b""), Entry)
        except Throttled:
            return True
        except Unreachable:
            return False
        except RemoteError:
            return True
        return True

    # --- calls ------------------------------------------------------------------------------------

    async def call(
        self,
        namespace: str,
        request: m.Request,
        kind: type[T],
        timeout: float = CALL_TIMEOUT,
        on_progress: Callable[[int], None] | None = None,
        delivery: Delivery | None = None,
    ) -> T:
        """Do what SiteClient.call does, through outages. `delivery` tells an attempt from waiting
        for one. Raises RemoteError."""
        progressed = partial(self._progressed, on_progress)
        sending = delivery or Delivery()

        async def ask() -> T:
            with sending.attempt():
                return await self._site.call(namespace, request, kind, timeout, progressed)

        return await self._through_outages(request, ask, lambda error: _may_repeat(request, error))

    async def call_pages(
        self,
        namespace: str,
        request: m.List,
        on_page: Callable[[bytes], None],
        timeout: float = CALL_TIMEOUT,
    ) -> None:
        """Do what SiteClient.call_pages does, through outages that come before a listing is long.

        Raises RemoteError.
        """
        given = _GivenPages()

        def received(page: bytes) -> None:
            self._heard()
            on_page(given.without_repeated(page))

        async def ask() -> None:
            given.begin()
            await self._site.call_pages(namespace, request, received, timeout)

        await self._through_outages(request, ask, lambda error: given.are_few)

    def _progressed(self, on_progress: Callable[[int], None] | None, done: int) -> None:
        self._heard()
        if on_progress:
            on_progress(done)

    async def _through_outages(
        self,
        request: m.Request,
        ask: Callable[[], Awaitable[T]],
        may_repeat: Callable[[Unreachable], bool],
    ) -> T:
        may_be_done = False
        give_up_at: float | None = None
        pause = FIRST_PAUSE
        while True:
            try:
                await self._until_answering(request)
                return await self._ask(request, ask)
            except Unreachable as error:
                now = trio.current_time()
                give_up_at = give_up_at or now + self._patience.seconds
                is_over = self._patience.state is Reachability.AWAY or now >= give_up_at
                if is_over or not may_repeat(error):
                    if may_be_done and isinstance(error, NotConnected):
                        raise Unreachable(error.message) from None
                    raise
                may_be_done |= not isinstance(error, NotConnected | Throttled)
                log.debug("%s is asked again: %s", type(request).__name__, error.message)
            except RemoteError as error:
                if not may_be_done:
                    raise
                return cast("T", await self._resolve(request, error))
            if self._patience.state is Reachability.ANSWERING:  # it answers others
                await trio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)

    async def _ask(self, request: m.Request, ask: Callable[[], Awaitable[T]]) -> T:
        """Make the call once, unless the patience ends first."""
        began = self._patience.asked()
        with trio.CancelScope() as scope:
            if not isinstance(request, _ASKED_AT_ONCE):
                self._scopes.add(scope)
                self._watch()
            try:
                answer = await ask()
            except RemoteError as error:
                self._judge(error, began)
                raise
            finally:
                self._scopes.discard(scope)
                self._patience.left()
            if not isinstance(request, _ANSWERED_HERE):
                self._answered()
            return answer
        raise TimedOut(self._patience.reason)

    async def _until_answering(self, request: m.Request) -> None:
        """Return when it makes sense to ask. Raises NotConnected where it is away."""
        state = self._patience.state
        if state is Reachability.ANSWERING or isinstance(request, _ASKED_AT_ONCE):
            return
        self._patience.wanted()
        self._look_for_it()
        if self._waits_itself:
            return
        while self._patience.state is Reachability.FAILING:
            with trio.move_on_at(self._patience.deadline):
                await self._changed.wait()
            if self._patience.has_ended():
                break
        if self._patience.state is Reachability.AWAY:
            raise NotConnected(self._patience.reason)

    # --- what answers tell ------------------------------------------------------------------------

    def _answered(self) -> None:
        self._refused = False
        self._heard()

    def _heard(self) -> None:
        """It is there: who waits for that goes on."""
        was = self._patience.state
        self._patience.heard()
        if was is not Reachability.ANSWERING:
            self._tell_waiting()

    def _judge(self, error: RemoteError, began: float) -> None:
        """Note what the failure of a call that began then tells of the namespace."""
        if not isinstance(error, Unreachable) or isinstance(error, Throttled):
            self._answered()
            self._refused = isinstance(error, AccessRefused | HostKeyRefused)
        elif self._waits_itself and isinstance(error, NotConnected):
            self._patience.give_up(error.message)
            self._look_for_it()
        elif not isinstance(error, TimedOut) or self._patience.is_silent_since(began):
            self._patience.failed(error.message)
            self._look_for_it()

    def _tell_waiting(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- silence ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        if not self._is_watched:
            self._is_watched = True
            self._nursery.start_soon(self._watch_silence)

    async def _watch_silence(self) -> None:
        """End the calls that wait when the patience ends. No task for each call: most end soon."""
        try:
            while self._scopes and self._patience.state is not Reachability.AWAY:
                due = max(self._patience.deadline, trio.current_time())
                await trio.sleep_until(due)
                was_stopped = trio.current_time() - due > STOPPED_SECONDS
                if was_stopped or self._site.asked_within(self._patience.seconds):
                    self._heard()
                elif self._scopes and self._patience.has_ended():
                    self._end_waiting()
                    return
        finally:
            self._is_watched = False

    def _end_waiting(self) -> None:
        """It is away: fail the calls that wait, and look for it from now on."""
        for scope in self._scopes:
            scope.cancel()
        self._site.note_silence(self._patience.reason)
        self._tell_waiting()
        self._look_for_it()

    def _look_for_it(self) -> None:
        if not self._is_looked_for:
            self._is_looked_for = True
            self._nursery.start_soon(self._look)

    async def _look(self) -> None:
        """Ask whether the namespace is back until it is, so that nobody else waits for that."""
        try:
            while self._patience.state is not Reachability.ANSWERING:
                pause = self._patience.next_look()
                if pause is None:
                    return
                await trio.sleep(pause)
                await self._look_once()
                if self._patience.has_ended():
                    self._tell_waiting()
        finally:
            self._is_looked_for = False

    async def _look_once(self) -> None:
        request = m.Connect()
        try:
            await self._site.call(self._namespace, request, Capabilities, LOOK_SECONDS)
        except Unreachable as error:
            if isinstance(error, Throttled):
                self._answered()
            elif not isinstance(error, TimedOut):
                self._patience.reason = error.message
        except RemoteError as error:
            self._judge(error, trio.current_time())
        else:
            self._answered()

    # --- what may have been carried out -----------------------------------------------------------

    async def _resolve(self, request: m.Request, error: RemoteError) -> Entry | None:
        """An earlier attempt may have done it: return its answer if the remote is as that would
        have left it. Raises `error` if not, and RemoteError."""
        match request:
            case m.Remove() | m.RemoveDirectory() if isinstance(error, NotFound):
                return None
            case m.Rename(path, target) if isinstance(error, NotFound | AlreadyExists):
                if await self._find(path) is None and await self._find(target) is not None:
                    return None
            case m.Create(path) | m.MakeDirectory(path) | m.MakeSymlink(path) if isinstance(
                error, AlreadyExists
            ):
                found = await self._find(path)
                if found is not None and await self._is_made_by(request, found):
                    return found
            case m.MakeLink(existing, path) if isinstance(error, AlreadyExists):
                original, found = await self._find(existing), await self._find(path)
                if original and found and original.version == found.version:
                    return found
        raise error

    async def _is_made_by(self, request: m.Request, found: Entry) -> bool:
        """Whether what is there is what the request makes. The name was free a moment before the
        first attempt, as the kernel looks it up before it asks for a new one."""
        match request:
            case m.Create():
                return stat.S_ISREG(found.mode) and not found.size
            case m.MakeDirectory():
                return stat.S_ISDIR(found.mode)
            case m.MakeSymlink(path, target) if stat.S_ISLNK(found.mode):
                return await self.call(self._namespace, m.ReadLink(path), bytes) == target
        return False

    async def _find(self, path: bytes) -> Entry | None:
        try:
            return await self.call(self._namespace, m.Stat(path), Entry)
        except NotFound:
            return None


class _GivenPages:
    """The pages of a listing that its reader already has, in case it is asked for once more."""

    def __init__(self) -> None:
        self._pages: list[bytes] = []
        self._names: frozenset[bytes] = frozenset()
        self._count = 0

    @property
    def are_few(self) -> bool:
        """Whether the names in them are known."""
        return self._count <= MOST_PAGES_AGAIN

    def begin(self) -> None:
        """The listing is asked for."""
        if self._pages:
            entries = (entry for page in self._pages for entry in _entries.decode(page))
            self._names = frozenset(entry.name for entry in entries)

    def without_repeated(self, page: bytes) -> bytes:
        """Return the page without names that were given before."""
        if self._names:
            new = [entry for entry in _entries.decode(page) if entry.name not in self._names]
            page = msgspec.msgpack.encode(new)
        self._count += 1
        if self.are_few:
            self._pages.append(page)
        else:
            self._pages.clear()
        return page


def _may_repeat(request: m.Request, error: Unreachable) -> bool:
    """Whether this call is to be made again by itself."""
    if isinstance(request, (*_ASKED_AT_ONCE, m.UploadPiece)):
        return False
    return isinstance(error, NotConnected) or not isinstance(request, _MADE_AGAIN_BY_OTHERS)
