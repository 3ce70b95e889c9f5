"""Calls that outlast an outage (site/calls.py): a site that breaks as told, in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hpcfs.model.entries import Entry
from hpcfs.model.errors import (
    AccessRefused,
    AlreadyExists,
    NotConnected,
    NotFound,
    RemoteError,
    Throttled,
    TimedOut,
    Unreachable,
)
from hpcfs.protocol import messages as m
from hpcfs.site.calls import MOST_PAGES_AGAIN, PatientCalls
from hpcfs.site.patience import Patience

PATIENCE = 30.0
FILE = Entry(b"name", 0o100644, 0, 1, 1, 0, 0, b"v1")
LONGER = Entry(b"name", 0o100644, 5, 1, 1, 0, 0, b"v2")
DIRECTORY = Entry(b"name", 0o040755, 0, 1, 1, 0, 0)
LINK = Entry(b"name", 0o120777, 0, 1, 1, 0, 0)


class Site:
    """Stands for site/client.py. `down` are the seconds in which calls fail, `silent` those in
    which they are not answered; `done` has what was carried out."""

    def __init__(self) -> None:
        self.down = self.silent = (0.0, 0.0)
        self.names: dict[bytes, Entry] = {}
        self.loses_answer = False
        """The next change is carried out, and its answer lost."""
        self.comes_meanwhile: Entry | None = None
        """What others put under the name "new" when an answer was lost."""
        self.refuses: RemoteError | None = None
        self.calls: list[m.Request] = []
        self.looks_fail = False
        """Looks for the namespace are not answered, whatever else is."""
        self.lasts = self.told_at = 0.0
        """How long a Truncate takes, and when it tells of its progress."""
        self.asking = self.is_silent = False
        self.pages: list[bytes] = []
        self.breaks_at = 0
        """After so many pages the link breaks."""

    def note_silence(self, reason: str) -> None:
        self.is_silent = True

    def asked_within(self, seconds: float) -> bool:
        return self.asking

    async def call(
        self,
        namespace: str,
        request: m.Request,
        kind: type[Any],
        timeout: float = 30.0,
        on_progress: Callable[[int], None] | None = None,
    ) -> Any:
        self.calls.append(request)
        with trio.move_on_after(timeout):
            await self._reach()
            if isinstance(request, m.Truncate) and on_progress:
                await trio.sleep(self.told_at)
                on_progress(1)
                await trio.sleep(self.lasts)
            answer = self._perform(request)
            if self.loses_answer and not isinstance(request, m.Stat | m.Connect):
                self.loses_answer = False
                if self.comes_meanwhile:
                    self.names[b"new"] = self.comes_meanwhile
                raise Unreachable("the connection was lost")
            return answer
        raise TimedOut(f"no answer within {timeout:g} s")

    async def call_pages(
        self,
        namespace: str,
        request: m.List,
        on_page: Callable[[bytes], None],
        timeout: float = 30.0,
    ) -> None:
        self.calls.append(request)
        await self._reach()
        for number, page in enumerate(self.pages):
            on_page(page)
            if self.loses_answer or number + 1 == self.breaks_at:
                self.loses_answer = False
                raise Unreachable("the connection was lost")

    async def _reach(self) -> None:
        await trio.sleep(0.01)
        if self.looks_fail and isinstance(self.calls[-1], m.Connect):
            raise NotConnected("nothing answers there")
        now = trio.current_time()
        if self.refuses:
            raise self.refuses
        if self.silent[0] <= now < self.silent[1]:
            await trio.sleep_until(self.silent[1])
        if self.down[0] <= now < self.down[1]:
            raise NotConnected("nothing answers there")

    def _perform(self, request: m.Request) -> Any:
        names = self.names
        match request:
            case m.Stat(path):
                return self._get(path)
            case m.Create(path) | m.MakeDirectory(path) | m.MakeSymlink(path):
                if path in names:
                    raise AlreadyExists("taken")
                kinds = {m.Create: FILE, m.MakeDirectory: DIRECTORY, m.MakeSymlink: LINK}
                names[path] = kinds[type(request)]
                return names[path]
            case m.MakeLink(existing, path):
                if path in names:
                    raise AlreadyExists("taken")
                names[path] = self._get(existing)
                return names[path]
            case m.Remove(path) | m.RemoveDirectory(path):
                self._get(path)
                del names[path]
            case m.Rename(path, target):
                names[target] = self._get(path)
                del names[path]
            case m.ReadLink():
                return b"there"
        return None

    def _get(self, path: bytes) -> Entry:
        if path not in self.names:
            raise NotFound("no such name")
        return self.names[path]


Story = Callable[[Site, PatientCalls], Awaitable[None]]


def story(told: Story) -> Callable[[], None]:
    """Make a test of a story about a namespace that has answered once. It begins at 1 s."""

    async def run() -> None:
        site = Site()
        async with trio.open_nursery() as nursery:
            policy = Patience(PATIENCE, trio.current_time, lambda: 0.0)
            calls = PatientCalls(site, "ns", policy, nursery)  # type: ignore[arg-type]
            site.names[b"seen"] = FILE
            await calls.call("ns", m.Stat(b"seen"), Entry)
            await trio.sleep_until(start + 1)
            with trio.fail_after(3600):
                await told(site, calls)
            nursery.cancel_scope.cancel()

    clock = trio.testing.MockClock(autojump_threshold=0)
    start = clock.current_time()

    def test() -> None:
        trio.run(run, clock=clock)

    test.__name__ = told.__name__
    test.__doc__ = told.__doc__
    return test


def stat(calls: PatientCalls, path: bytes = b"seen") -> Awaitable[Entry]:
    return calls.call("ns", m.Stat(path), Entry)


def outage(seconds: float) -> tuple[float, float]:
    now = trio.current_time()
    return now, now + seconds


@story
async def test_a_short_outage_is_a_pause(site: Site, calls: PatientCalls) -> None:
    site.down = outage(20)
    began = trio.current_time()
    assert await stat(calls) == FILE
    assert 20 <= trio.current_time() - began < 21.5


@story
async def test_a_long_outage_is_an_error_in_time_and_then_at_once(
    site: Site, calls: PatientCalls
) -> None:
    site.down = outage(100)
    began = trio.current_time()
    with pytest.raises(NotConnected, match="nothing answers there"):
        await stat(calls)
    assert PATIENCE <= trio.current_time() - began + 1 <= PATIENCE + 1.1
    assert calls.is_away
    for _ in range(20):
        now = trio.current_time()
        with pytest.raises(NotConnected):
            await stat(calls)
        assert trio.current_time() == now
    await trio.sleep_until(began + 106)
    assert not calls.is_away, "it is looked for, so nobody has to try"
    assert await stat(calls) == FILE


@story
async def test_silence_ends_all_who_wait_together(site: Site, calls: PatientCalls) -> None:
    site.silent = outage(1000)
    began = trio.current_time()
    ended: list[float] = []

    async def ask(after: float) -> None:
        await trio.sleep(after)
        with pytest.raises(Unreachable):
            await stat(calls)
        ended.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(ask, number * 0.9)
    assert len(ended) == 50
    assert site.is_silent, "as the status tells"
    assert sum(at <= PATIENCE + 0.1 for at in ended) > 30, "counted from the last answer"
    assert sorted(ended)[-1] < 49 * 0.9 + 0.1, "who came later was answered at once"


@story
async def test_silence_that_ends_in_time_is_no_error(site: Site, calls: PatientCalls) -> None:
    site.silent = outage(25)
    assert await stat(calls) == FILE
    assert len(site.calls) == 2


@story
async def test_no_time_passes_while_the_user_is_asked(site: Site, calls: PatientCalls) -> None:
    site.silent = outage(200)
    site.asking = True
    began = trio.current_time()
    assert await calls.call("ns", m.Stat(b"seen"), Entry, 1000.0) == FILE
    assert trio.current_time() - began >= 200


@story
async def test_any_sign_of_life_ends_the_pause(site: Site, calls: PatientCalls) -> None:
    """Of a call that lasts, as an upload does: not only an answer."""
    began = trio.current_time()
    site.down = outage(0.005)
    async with trio.open_nursery() as nursery:

        async def upload() -> None:
            await calls.call("ns", m.Truncate(b"long", 0), type(None), 100.0)

        site.lasts, site.told_at = 20.0, 0.5
        nursery.start_soon(upload)
        await trio.sleep(0.02)
        site.down = outage(0.2)
        site.looks_fail = True
        assert await stat(calls) == FILE
        assert trio.current_time() - began < 2, "and not only when the patience ends"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("seconds", [5.0, 60.0])
def test_a_laptop_that_is_away_is_away_during_a_call_too(seconds: float) -> None:
    async def run() -> None:
        site = Site()
        async with trio.open_nursery() as nursery:
            policy = Patience(PATIENCE, trio.current_time, lambda: 0.0)
            calls = PatientCalls(site, "ns", policy, nursery, waits_itself=True)  # type: ignore[arg-type]
            site.down = outage(10_000)
            with pytest.raises(NotConnected):
                await stat(calls)
            await trio.sleep(100)
            site.silent = outage(seconds)
            began = trio.current_time()
            async with trio.open_nursery() as asking:

                async def ask() -> None:
                    with pytest.raises(Unreachable):
                        await stat(calls)

                asking.start_soon(ask)
                await trio.sleep(3)
                assert calls.is_away
                assert calls.failing
            assert min(seconds, 30.0) - 0.1 <= trio.current_time() - began <= 30.1
            nursery.cancel_scope.cancel()

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))


@story
async def test_a_piece_of_a_file_is_not_sent_again(site: Site, calls: PatientCalls) -> None:
    """The remote may have lost those before it; the upload at the close brings all."""
    site.down = outage(1)
    with pytest.raises(NotConnected):
        await calls.call("ns", m.UploadPiece(request=None, cache_file=""), type(None))  # type: ignore[arg-type]


@story
async def test_a_server_that_wants_fewer_requests_is_there(site: Site, calls: PatientCalls) -> None:
    site.refuses = Throttled("slow down")
    with pytest.raises(Throttled):
        await stat(calls)
    assert not calls.is_away


@story
async def test_a_refused_login_is_away_until_it_is_accepted(
    site: Site, calls: PatientCalls
) -> None:
    site.refuses = AccessRefused("the key is not accepted")
    with pytest.raises(AccessRefused):
        await stat(calls)
    assert calls.is_away
    assert len(site.calls) == 2, "a refused login is not repeated"
    site.refuses = None
    await stat(calls)
    assert not calls.is_away


CHANGES: list[tuple[m.Request, dict[bytes, Entry], object]] = [
    (m.Create(b"new", 0o644), {}, FILE),
    (m.MakeDirectory(b"new", 0o755), {}, DIRECTORY),
    (m.MakeSymlink(b"new", b"there"), {}, LINK),
    (m.MakeLink(b"seen", b"new"), {}, FILE),
    (m.Remove(b"old"), {b"old": FILE}, None),
    (m.RemoveDirectory(b"old"), {b"old": DIRECTORY}, None),
    (m.Rename(b"old", b"new"), {b"old": FILE}, None),
]


@pytest.mark.parametrize(("request_", "before", "answer"), CHANGES)
@pytest.mark.parametrize("is_done", [True, False])
def test_a_change_whose_answer_was_lost(
    request_: m.Request, before: dict[bytes, Entry], answer: object, is_done: bool
) -> None:
    """It is made once, whether or not the first attempt has done it."""

    async def told(site: Site, calls: PatientCalls) -> None:
        site.names.update(before)
        if is_done:
            site.loses_answer = True
        else:
            site.down = outage(5)
        assert await calls.call("ns", request_, object) == answer
        assert (b"old" in site.names) is False
        assert (b"new" in site.names) is (answer is not None or isinstance(request_, m.Rename))

    story(told)()


@pytest.mark.parametrize(
    "other", [LONGER, DIRECTORY], ids=["a file with bytes", "something of another kind"]
)
def test_what_others_made_meanwhile_is_not_taken_for_ours(other: Entry) -> None:
    async def told(site: Site, calls: PatientCalls) -> None:
        site.loses_answer, site.comes_meanwhile = True, other
        with pytest.raises(AlreadyExists):
            await calls.call("ns", m.Create(b"new", 0o644), Entry)

    story(told)()


@story
async def test_without_an_outage_errors_are_told_as_they_are(
    site: Site, calls: PatientCalls
) -> None:
    with pytest.raises(NotFound):
        await calls.call("ns", m.Remove(b"missing"), type(None))
    with pytest.raises(AlreadyExists):
        await calls.call("ns", m.Create(b"seen", 0o644), Entry)


@story
async def test_what_may_have_been_done_is_not_told_as_not_sent(
    site: Site, calls: PatientCalls
) -> None:
    """NotConnected would say that nothing was carried out."""
    site.loses_answer = True
    site.names[b"old"] = FILE
    now = trio.current_time()
    site.down = (now + 0.011, now + 1000)
    with pytest.raises(Unreachable) as told:
        await calls.call("ns", m.Remove(b"old"), type(None))
    assert not isinstance(told.value, NotConnected)


def page(*names: int) -> bytes:
    return msgspec.msgpack.encode([msgspec.structs.replace(FILE, name=b"%d" % n) for n in names])


@story
async def test_a_listing_that_breaks_off_goes_on(site: Site, calls: PatientCalls) -> None:
    """Each name comes once."""
    site.pages = [page(1, 2), page(3)]
    site.down = outage(5)
    site.loses_answer = True
    found: list[bytes] = []

    def add(one: bytes) -> None:
        found.extend(entry.name for entry in msgspec.msgpack.decode(one, type=list[Entry]))

    await calls.call_pages("ns", m.List(b""), add)
    assert not site.loses_answer
    assert found == [b"1", b"2", b"3"]


@story
async def test_a_long_listing_that_breaks_off_is_an_error(site: Site, calls: PatientCalls) -> None:
    """Else all its names would have to be kept."""
    site.pages = [page(n) for n in range(MOST_PAGES_AGAIN + 2)]
    site.breaks_at = MOST_PAGES_AGAIN + 1
    found: list[bytes] = []
    with pytest.raises(Unreachable):
        await calls.call_pages("ns", m.List(b""), found.append)
    assert len(found) == MOST_PAGES_AGAIN + 1


@story
async def test_an_upload_that_may_have_begun_is_left_to_who_knows_what_changed(
    site: Site, calls: PatientCalls
) -> None:
    site.loses_answer = True
    upload = m.Upload(request=None, cache_file="")  # type: ignore[arg-type]
    with pytest.raises(Unreachable):
        await calls.call("ns", upload, Entry)
    site.down = outage(5)
    await calls.call("ns", upload, type(None))
