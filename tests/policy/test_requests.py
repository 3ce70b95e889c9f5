"""The kernel's requests under way: interrupted callers, and the share of a namespace."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from functools import partial, wraps
from typing import cast

import pytest
import trio
import trio.testing

from hpcfs.kernel.callers import Callers
from hpcfs.kernel.requests import LONGEST_LOOK_SECONDS, OLD_SECONDS, STALLED_SECONDS, KernelRequests
from hpcfs.model.errors import Unreachable
from hpcfs.site.namespace import Namespace

SHARE = 3
THREADS = 200
"""Of a large program."""


class Threads:
    """Those that were interrupted, and the questions. Thread 1234 is one of the process 1000."""

    def __init__(self) -> None:
        self.interrupted = set[int]()
        self.asked = Counter[str]()

    def is_interrupted(self, thread: int) -> bool:
        self.asked[f"thread {thread}"] += 1
        return thread in self.interrupted

    def process_of(self, thread: int) -> int:
        return thread // 1000 * 1000 or thread

    def users_of(self, opener: int) -> Iterator[int]:
        process = self.process_of(opener)
        self.asked[f"users of {process}"] += 1
        yield from range(process, process + THREADS) if process >= 1000 else (opener,)


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


def in_virtual_time(story: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    @wraps(story)
    def run() -> None:
        trio.run(story, clock=trio.testing.MockClock(autojump_threshold=0))

    return run


def namespace(name: str) -> Namespace:
    return cast("Namespace", Named(name))


def requests(threads: Threads) -> KernelRequests:
    return KernelRequests(cast("Callers", threads), trio.current_time, SHARE)


@in_virtual_time
async def test_who_is_interrupted_is_answered_and_nobody_else() -> None:
    threads = Threads()
    all_requests = requests(threads)
    ended: dict[int, int] = {}

    async def wait(caller: int, *, by_handle: bool) -> None:
        request = all_requests.begin(namespace("ns"), caller, by_handle=by_handle)
        with request.scope:
            await trio.sleep_forever()
        all_requests.end(request)
        ended[caller] = request.errno

    async with trio.open_nursery() as nursery:
        nursery.start_soon(all_requests.watch)
        for caller in (0, 1, 2):
            nursery.start_soon(partial(wait, caller, by_handle=caller == 2))
        await trio.sleep(60)
        assert ended == {}
        threads.interrupted |= {0, 2}
        await trio.sleep(OLD_SECONDS)
        assert ended == {2: errno.EINTR}
        threads.interrupted |= {1}
        await trio.sleep(OLD_SECONDS)
        assert ended == {1: errno.EINTR, 2: errno.EINTR}
        nursery.cancel_scope.cancel()


@in_virtual_time
async def test_of_many_requests_of_one_program_each_thread_is_asked_about_once() -> None:
    threads = Threads()
    all_requests = requests(threads)
    openers = range(1000, 1000 + THREADS)
    held = [all_requests.begin(None, opener, by_handle=True) for opener in openers]
    held += [all_requests.begin(None, opener, by_handle=False) for opener in openers]
    other = all_requests.begin(None, 2001, by_handle=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(all_requests.watch)
        await trio.sleep(2 * LONGEST_LOOK_SECONDS)
        await trio.testing.wait_all_tasks_blocked()
        assert len(threads.asked) == 2 * THREADS + 2
        assert len(set(threads.asked.values())) == 1, "once in each look, as of the other program"
        threads.interrupted.add(1042)
        await trio.sleep(2 * LONGEST_LOOK_SECONDS)
        nursery.cancel_scope.cancel()
    by_handle, by_caller = held[:THREADS], held[THREADS:]
    assert all(request.scope.cancel_called for request in by_handle)
    assert [one.caller for one in by_caller if one.scope.cancel_called] == [1042]
    assert not other.scope.cancel_called


@in_virtual_time
async def test_while_requests_end_soon_nobody_looks_for_callers() -> None:
    threads = Threads()
    all_requests = requests(threads)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(all_requests.watch)
        for _ in range(100):
            request = all_requests.begin(namespace("ns"), 1, by_handle=False)
            await trio.sleep(OLD_SECONDS / 2)
            all_requests.end(request)
        nursery.cancel_scope.cancel()
    assert not threads.asked


@in_virtual_time
async def test_a_namespace_that_stands_still_gets_no_more_than_its_share() -> None:
    all_requests = requests(Threads())
    dead, alive = namespace("dead"), namespace("alive")
    await trio.sleep(1000)
    held = [all_requests.begin(dead, 1, by_handle=True) for _ in range(SHARE)]
    all_requests.end(all_requests.begin(dead, 1, by_handle=True))  # it may just be busy
    await trio.sleep(STALLED_SECONDS)
    with pytest.raises(Unreachable, match="dead does not answer"):
        all_requests.begin(dead, 1, by_handle=True)
    for _ in range(2 * SHARE):
        all_requests.begin(alive, 1, by_handle=True)
    all_requests.end(held.pop())
    held.append(all_requests.begin(dead, 1, by_handle=True))
    all_requests.end(all_requests.begin(dead, 1, by_handle=True))


@in_virtual_time
async def test_who_waits_for_a_namespace_is_given_up() -> None:
    all_requests = requests(Threads())
    dead, alive = namespace("dead"), namespace("alive")
    one = all_requests.begin(dead, 1, by_handle=True)
    other = all_requests.begin(alive, 1, by_handle=True)
    assert all_requests.namespaces() == {dead, alive}
    assert all_requests.held_by(dead) == 1
    all_requests.give_up(dead)
    assert (one.scope.cancel_called, one.errno) == (True, errno.EHOSTUNREACH)
    assert not other.scope.cancel_called
