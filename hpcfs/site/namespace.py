"""A namespace as the filesystem sees it: typed calls to its site, and what the remote can do.

`SiteCalls` is all that the filesystem needs of a site (site/calls.py); tests put a remote in memory
behind it.
"""

from __future__ import annotations

import stat
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import msgspec

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Entry
from hpcfs.model.errors import NotConnected, NotFound, ReadOnly, RemoteError, Unreachable
from hpcfs.model.uploads import UploadRequest
from hpcfs.protocol import messages as m
from hpcfs.site.bandwidth import Bandwidth

T = TypeVar("T")
WriteMode = Literal["through", "back"]
"""Whether close(2) waits for the remote (through) or the local journal (back)."""
SymlinkMode = Literal["contain", "follow", "hide"]
"""Where symbolic links of the remote may lead: to what is in the namespace, anywhere; or they are
not shown."""

DEFAULT_TIMEOUT = 30.0
"""Seconds without an answer or progress, for every call."""
LOGIN_TIMEOUT = 90.0
RATE_SECONDS = 5.0
"""Over which the rate of uploads is taken."""


_entries = msgspec.msgpack.Decoder(list[Entry])


class Delivery:
    """Whether a request may have reached the remote, for a caller that hears no answer."""

    may_have_arrived = False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Around an attempt: the request leaves. NotConnected says that it did not."""
        arrived_before, self.may_have_arrived = self.may_have_arrived, True
        try:
            yield
        except NotConnected:
            self.may_have_arrived = arrived_before
            raise


class SiteCalls(Protocol):
    """Calls to one site's transfer process."""

    @property
    def is_away(self) -> bool:
        """Whether calls fail at once, as there was no answer for too long, or the login is
        refused."""
        ...

    @property
    def failing(self) -> str:
        """Why there is no answer now, for whatever time; empty while there is."""
        ...

    @property
    def patience(self) -> float:
        """For how many seconds an outage is only a pause."""
        ...

    async def give_up_if_silent(self, seconds: float) -> bool:
        """Fail the calls that wait if nothing is heard for so long; return whether they fail."""
        ...

    async def call(
        self,
        namespace: str,
        request: m.Request,
        kind: type[T],
        timeout: float = ...,
        on_progress: Callable[[int], None] | None = ...,
        delivery: Delivery | None = ...,
    ) -> T:
        """Return the answer to a request, decoded as `kind`; `delivery` tells meanwhile whether the
        request left. Raises RemoteError."""
        ...

    async def call_pages(
        self,
        namespace: str,
        request: m.List,
        on_page: Callable[[bytes], None],
        timeout: float = ...,
    ) -> None:
        """Give each page of a listing, still encoded, to `on_page`. Raises RemoteError."""
        ...


_EMPTY_NOTED = 10_000


class UploadRate:
    """Counts uploaded bytes, and how fast that goes; `now` is any clock in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.total = 0
        self._recent: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """Count bytes that were uploaded now."""
        now = self._now()
        self.total += count
        if self._recent and now - self._recent[-1][0] < RATE_SECONDS / 20:
            at, before = self._recent.pop()
            self._recent.append((at, before + count))
        else:
            self._recent.append((now, count))
        self._forget(now)

    def rate(self) -> float:
        """Return bytes per second, over the last RATE_SECONDS."""
        self._forget(self._now())
        return sum(count for _, count in self._recent) / RATE_SECONDS

    def _forget(self, now: float) -> None:
        while self._recent and now - self._recent[0][0] > RATE_SECONDS:
            self._recent.popleft()


@dataclass(frozen=True)
class NamespacePolicy:
    """How the mount treats a remote.

    `keeps_xattrs` is known without asking the remote: the kernel asks with the first write.
    """

    read_only: bool = False
    write: WriteMode = "through"
    symlinks: SymlinkMode = "contain"
    keeps_xattrs: bool = False


class Namespace:
    """One top-level directory of the mount: typed calls to the remote folder behind it.

    `origin` names that folder across mounts: the cache is kept under it. All namespaces of a site
    share its `bandwidth`.
    """

    def __init__(
        self,
        name: str,
        origin: str,
        site: SiteCalls,
        policy: NamespacePolicy,
        bandwidth: Bandwidth | None = None,
    ) -> None:
        self.name = name
        self.origin = origin
        self.read_only = policy.read_only
        self.writes_back = policy.write == "back"
        self.symlinks = policy.symlinks
        self.keeps_xattrs = policy.keeps_xattrs
        self.bandwidth = bandwidth or Bandwidth()
        self._site = site
        self.uploaded = UploadRate(time.monotonic)
        self._capabilities: Capabilities | None = None
        self._next_handle = 0
        self._empty: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        """(path, version) of files without bytes that were read, and had none."""

    def is_empty(self, path: bytes, version: bytes) -> bool:
        """Whether this file was found to have no bytes; its size says nothing of one in /proc."""
        return (path, version) in self._empty

    def note_empty(self, path: bytes, version: bytes) -> None:
        """This file tells no size, and had no bytes when it was read."""
        self._empty[path, version] = None
        if len(self._empty) > _EMPTY_NOTED:
            self._empty.popitem(last=False)

    @property
    def is_away(self) -> bool:
        """Whether calls fail at once: there was no answer for longer than the patience, or the site
        refuses the login. A look for it goes on in the background."""
        return self._site.is_away

    def absence_explains(self, error: Exception) -> bool:
        """Whether a request failed because the namespace is away: what was seen of it before is
        believed instead."""
        is_no_answer = isinstance(error, RemoteError) and (
            error.lasting or isinstance(error, Unreachable)
        )
        return self.is_away and is_no_answer

    @property
    def failing(self) -> str:
        """Why there is no answer now; empty while there is. An outage may be a pause, or longer."""
        return self._site.failing

    @property
    def patience(self) -> float:
        """For how many seconds an outage is only a pause."""
        return self._site.patience

    async def give_up_if_silent(self, seconds: float) -> bool:
        """Return whether nothing is heard of the remote for so long, though it is asked. Then it
        counts as away, and all calls that wait for it fail."""
        return await self._site.give_up_if_silent(seconds)

    def new_handle(self) -> int:
        """Return a number that identifies an open file to the transfer process."""
        self._next_handle += 1
        return self._next_handle

    def check_writable(self) -> None:
        """Raise ReadOnly if the configuration says so."""
        if self.read_only:
            raise ReadOnly(f"{self.name} is mounted read-only")

    async def call(self, request: m.Request, kind: type[T], timeout: float = DEFAULT_TIMEOUT) -> T:
        """Return the answer to a request, decoded as `kind`. Raises RemoteError."""
        return await self._site.call(self.name, request, kind, timeout)

    def knows_capabilities(self, capabilities: Capabilities) -> None:
        """Assume the capabilities that an earlier mount found, until the remote is asked."""
        self._capabilities = self._capabilities or capabilities

    def knows_better(self, capabilities: Capabilities) -> None:
        """Replace the capabilities, of which one turned out to be missing."""
        self._capabilities = capabilities

    async def upload(
        self,
        request: UploadRequest,
        cache_file: str,
        timeout: float,
        on_progress: Callable[[int], None],
        delivery: Delivery | None = None,
    ) -> Entry:
        """Upload a file and return its entry; `on_progress` hears how many bytes are done."""
        counted = 0

        def progressed(done: int) -> None:
            nonlocal counted
            self.uploaded.add(max(0, done - counted))
            counted = max(counted, done)
            on_progress(done)

        upload = m.Upload(request, cache_file)
        return await self._site.call(self.name, upload, Entry, timeout, progressed, delivery)

    async def capabilities(self) -> Capabilities:
        """Return what the remote can do; connects on first use. Raises RemoteError."""
        if self._capabilities is None:
            self._capabilities = await self.call(m.Connect(), Capabilities, timeout=LOGIN_TIMEOUT)
        return self._capabilities

    async def check_takes_writes(self) -> None:
        """Raise ReadOnly where the remote would refuse a change that it hears of later."""
        if not (await self.capabilities()).read_only:
            return
        self._capabilities = await self.call(m.Connect(), Capabilities)  # perhaps it no longer is
        if self._capabilities.read_only:
            raise ReadOnly(f"{self.name} is read-only on the remote")

    @property
    def dates_directories(self) -> bool:
        """Whether the remote keeps directories' times; assumed until it is asked."""
        return self._capabilities is None or self._capabilities.dates_directories

    async def try_now(self) -> None:
        """Try to connect now, whenever the last attempt was, since somebody waits for the site.

        Raises RemoteError.
        """
        await self.call(m.Connect(now=True), Capabilities, timeout=LOGIN_TIMEOUT)

    async def log_in(self) -> None:
        """Log in anew, whatever was refused before. Raises RemoteError."""
        self._capabilities = await self.call(
            m.Connect(renew=True), Capabilities, timeout=LOGIN_TIMEOUT
        )

    async def stat(self, path: bytes) -> Entry:
        """Return the entry of a path. Raises RemoteError."""
        asked = self.bandwidth.now()
        entry = await self.call(m.Stat(path), Entry)
        self.bandwidth.answered(self.bandwidth.now() - asked)
        if self.symlinks == "hide" and stat.S_ISLNK(entry.mode):
            raise NotFound(f"{self.name} does not show its symbolic links")
        return entry

    async def fetch(self, request: m.Fetch, timeout: float) -> m.Fetched:
        """Have a range fetched into a cache file, within `timeout` seconds without progress."""
        mark = self.bandwidth.begin()
        fetched = await self.call(request, m.Fetched, timeout)
        self.bandwidth.delivered(mark, fetched.length)
        return fetched

    async def entry(self, request: m.Request) -> Entry:
        """Return the answer to a request that is the entry as it is afterwards.

        Raises RemoteError.
        """
        return await self.call(request, Entry)

    async def do(self, request: m.Request, delivery: Delivery | None = None) -> None:
        """Call without an answer. Raises RemoteError."""
        await self._site.call(self.name, request, type(None), DEFAULT_TIMEOUT, None, delivery)

    async def list_pages(self, path: bytes, on_page: Callable[[bytes], None]) -> None:
        """Give each page of a listing, a MessagePack list[Entry], to `on_page`.

        Raises RemoteError.
        """
        if self.symlinks == "hide":
            shown = on_page
            on_page = lambda page: shown(_without_links(page))  # noqa: E731
        await self._site.call_pages(self.name, m.List(path), on_page, DEFAULT_TIMEOUT)


def _without_links(page: bytes) -> bytes:
    """Return a MessagePack list[Entry] without symbolic links; any other page as it is."""
    try:
        entries = _entries.decode(page)
    except msgspec.DecodeError:
        return page
    left = [entry for entry in entries if not stat.S_ISLNK(entry.mode)]
    return page if len(left) == len(entries) else msgspec.msgpack.encode(left)
