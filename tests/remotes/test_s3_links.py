"""Links to S3 that die, and servers that only take long: told apart, in time, by the right error.

That the mount goes on by itself is tested in tests/faults; hours of it: scripts/torture.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import NotConnected, TimedOut, Unreachable
from hpcfs.model.sites import S3Root, S3Site, SiteSpec
from hpcfs.remotes import life
from hpcfs.remotes.base import no_report
from hpcfs.remotes.rate import RateLimit
from hpcfs.remotes.s3 import deadlines, http, pool as pools
from hpcfs.remotes.s3.pool import DEAD_SECONDS, HostLookup, NotOpened, Pool, new_socket
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.remotes.test_s3_direct import ASK, OK, ask, asking, pool_to, put, remote_of
from tests.support.link import Link, link_to
from tests.support.s3 import S3Server

SILENCE = 0.6
OUTER = 30.0
"""Seconds within which anything here is over, on whatever machine."""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "TICK_SECONDS", 0.05)
    for name in ("SILENCE", "LISTING"):
        monkeypatch.setattr(deadlines, name, SILENCE)


@contextmanager
def far(server: S3Server) -> Iterator[tuple[Link, S3Server]]:
    with link_to(int(server.endpoint_url.rpartition(":")[2])) as link:
        yield link, replace(server, endpoint_url=f"http://127.0.0.1:{link.port}")


async def _list(remote: S3Remote) -> list[bytes]:
    return [entry.name async for page in remote.list(b"") for entry in page]


OPERATIONS: dict[str, Callable[[S3Remote], Coroutine[Any, Any, Any]]] = {
    "stat": lambda remote: remote.stat(b"f"),
    "list": _list,
    "mkdir": lambda remote: remote.make_directory(b"d", 0o755),
    "rename": lambda remote: remote.rename(b"g", b"h", replace=True, report=no_report),
    "remove": lambda remote: remote.remove(b"i"),
}


@asynccontextmanager
async def connected(server: S3Server, prefix: str, cache: str) -> AsyncIterator[S3Remote]:
    async with asyncio.timeout(OUTER), remote_of(server, prefix, cache=cache) as remote:
        with deadlines.silence(SILENCE):
            await remote.connect()
            await asyncio.gather(*(remote.stat(b"f") for _ in range(4)))  # idle ones
            yield remote


async def works_again(remote: S3Remote) -> None:
    """After the pause that a failure leaves, all at once, and no connection is still dead."""
    began = time.monotonic()
    while True:
        try:
            await remote.stat(b"f")
            break
        except Unreachable:
            await asyncio.sleep(0.02)
    assert time.monotonic() - began < 10
    assert await _list(remote)
    await asyncio.gather(*(remote.stat(b"f") for _ in range(10)))


@pytest.mark.parametrize("state", ["frozen", "deaf"])
def test_a_link_that_falls_silent_is_noticed(
    moto: S3Server, prefix: str, state: str, tmp_path: Any
) -> None:
    for name in ("f", "g", "i"):
        put(moto, f"{prefix}/{name}", b"data")

    async def test() -> None:
        with far(moto) as (link, server):
            async with connected(server, prefix, str(tmp_path)) as remote:
                link.freeze() if state == "frozen" else link.lose_answers_after(0)
                begun = [asyncio.create_task(run(remote)) for run in OPERATIONS.values()]
                found = await asyncio.gather(*begun, return_exceptions=True)
                assert [type(error) for error in found] == [TimedOut] * len(OPERATIONS)
                link.mend()
                await works_again(remote)

    asyncio.run(test())


def test_a_link_that_is_cut_says_whether_anything_was_sent(
    moto: S3Server, prefix: str, tmp_path: Any
) -> None:
    put(moto, f"{prefix}/f", b"data")

    async def test() -> None:
        with far(moto) as (link, server):
            async with connected(server, prefix, str(tmp_path)) as remote:
                link.cut()
                with pytest.raises(Unreachable):
                    await remote.stat(b"f")
                with pytest.raises(NotConnected):  # in the pause: nobody waits in line
                    await remote.stat(b"f")
                link.mend()
                await works_again(remote)

    asyncio.run(test())


def test_a_change_of_which_a_part_was_made_is_not_one_that_was_never_sent(
    moto: S3Server, prefix: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal writes the directory's marker first, where there is none yet."""
    for name in ("bare/f", "d/f"):
        put(moto, f"{prefix}/{name}", b"data")

    async def gone(key: str) -> None:
        raise NotConnected("nothing answers")

    async def test() -> None:
        async with remote_of(moto, prefix, cache=str(tmp_path)) as remote:
            await remote.set_attributes(b"d", Attributes(mode=0o750))
            monkeypatch.setattr(remote._bucket, "delete", gone)
            for path, kind in ((b"bare/f", Unreachable), (b"d/f", NotConnected)):
                with pytest.raises(Unreachable) as caught:
                    await remote.remove(path)
                assert type(caught.value) is kind

    asyncio.run(test())


# --- servers that take long -----------------------------------------------------------------------


def test_a_server_that_works_for_long_is_reported_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "WORKING_SECONDS", 1.0)
    monkeypatch.setattr(http, "REPORT_SECONDS", 0.1)
    signs: list[int] = []
    enough = asyncio.Event()

    def sign() -> None:
        signs.append(1)
        if len(signs) == 3:
            enough.set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await enough.wait()
        writer.write(OK + b"content-length: 2\r\n\r\nok")

    def request(seconds: float) -> http.HttpRequest:
        with deadlines.silence(seconds), life.reported_to(sign):
            return http.HttpRequest(b"POST / HTTP/1.1\r\n\r\n", limit=9)

    assert bytes(asyncio.run(ask(serve, request(OUTER))).body or b"") == b"ok"
    signs.clear()
    enough = asyncio.Event()
    with pytest.raises(TimeoutError):
        asyncio.run(ask(serve, request(0.5)))
    assert signs == [], "most answers begin at once: their silence is none of a server that works"


def test_a_link_that_is_slow_is_not_dead() -> None:
    """What the other side has yet to take of the body is a sign of life."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        left = 24 << 20
        while left:
            left -= len(await reader.read(min(left, 1 << 18)))
            await asyncio.sleep(0.02)
        writer.write(OK + b"content-length: 2\r\n\r\nok")

    async def test() -> None:
        async with asyncio.timeout(OUTER), pool_to(serve) as pool:
            began = time.monotonic()
            found = await pool.ask(replace(asking(bytes(24 << 20)), silence=SILENCE))
            assert bytes(found.body or b"") == b"ok"
            assert time.monotonic() - began > SILENCE

    asyncio.run(test())


def test_the_system_ends_a_connection_whose_other_side_is_gone() -> None:
    with new_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        each = [socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT]
        idle, between, count = (sock.getsockopt(socket.IPPROTO_TCP, name) for name in each)
        assert idle + between * (count - 1) <= DEAD_SECONDS
        limit = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        assert limit == 0, "it ends uploads to whoever takes bytes slowly through a small window"


@asynccontextmanager
async def never_read() -> AsyncIterator[int]:
    """The port of somebody who takes next to nothing, and reads nothing of it: what is sent stays
    with the sender's system, as on a link that is dead."""
    loop = asyncio.get_running_loop()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        accepting = loop.create_task(loop.sock_accept(listener))
        yield listener.getsockname()[1]
        (await accepting)[0].close()


def test_a_request_that_the_link_does_not_take_is_given_up_soon() -> None:
    """However long its answer may take: that is time for the server's work."""

    async def test() -> None:
        async with asyncio.timeout(OUTER), never_read() as port:
            limits = pools.PoolLimits(5)
            pool = Pool(pools.HostAddress("127.0.0.1", port, None), limits, lambda seconds: None)
            head = b"POST / HTTP/1.1\r\nx: " + b"y" * 30_000 + b"\r\n\r\n"
            with pytest.raises(TimeoutError, match="no answer in time"):
                await pool.ask(http.HttpRequest(head, silence=10 * OUTER))
            pool.close()

    asyncio.run(test())


def test_waiting_for_the_pace_is_no_silence() -> None:
    """Uploads that begin together share the bandwidth that the user allows."""
    size, count = 40_000, 6

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(size)
        writer.write(OK + b"content-length: 2\r\n\r\nok")

    async def test() -> None:
        pace = RateLimit(2 * size)
        async with asyncio.timeout(OUTER), pool_to(serve) as pool:
            began = time.monotonic()
            request = replace(asking(bytes(size)), silence=SILENCE, pace=pace)
            found = await asyncio.gather(*(pool.ask(request) for _ in range(count)))
            assert [bytes(one.body or b"") for one in found] == [b"ok"] * count
            assert time.monotonic() - began > 2 * SILENCE

    asyncio.run(test())


# --- names ----------------------------------------------------------------------------------------


def test_a_name_server_that_is_away_does_not_matter_for_known_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pools, "LOOKUP_SECONDS", 0.05)
    asked: list[str] = []
    release = asyncio.Event()

    async def test() -> None:
        loop = asyncio.get_running_loop()
        real = loop.getaddrinfo

        async def slow(host: str, *rest: Any, **named: Any) -> Any:
            asked.append(host)
            await release.wait()
            return await real(host, *rest, **named)

        lookup = HostLookup("127.0.0.1", 80)
        known = await lookup.addresses()
        assert known
        monkeypatch.setattr(loop, "getaddrinfo", slow)
        assert [await lookup.addresses() for _ in range(3)] == [known] * 3
        assert len(asked) == 1, "one question holds one thread"
        release.set()
        assert await lookup.addresses() == known

    asyncio.run(test())


def test_a_host_that_nothing_answers_for_was_sent_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "ATTEMPT_SECONDS", 0.05)
    attempts: list[object] = []

    async def silent(*addresses: object, **_: object) -> socket.socket:
        attempts.append(addresses)
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("aiohappyeyeballs.start_connection", silent)

    async def test() -> None:
        pool = Pool(
            pools.HostAddress("127.0.0.1", 1, None), pools.PoolLimits(0.5), lambda seconds: None
        )
        with pytest.raises(NotOpened, match="nothing answers"):
            await pool.ask(http.HttpRequest(b"HEAD / HTTP/1.1\r\n\r\n", bodiless=True))
        assert len(attempts) > 2, "a new attempt finds a link that is back sooner"

    asyncio.run(test())


# --- gentleness -----------------------------------------------------------------------------------


CHANGE = http.HttpRequest(b"PUT / HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
LOOK = http.HttpRequest(b"HEAD / HTTP/1.1\r\n\r\n", bodiless=True, urgent=True)


@pytest.mark.parametrize("connections", [1, 2, 3, 5])
def test_no_more_connections_than_the_user_allows(connections: int) -> None:
    most, here = 0, 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal most, here
        here += 1
        most = max(most, here)
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(0.01)
                writer.write(OK + b"content-length: 0\r\n\r\n")
        finally:
            here -= 1

    async def test() -> None:
        async with asyncio.timeout(OUTER), pool_to(serve, connections) as pool:
            kinds = (CHANGE, ASK, LOOK)
            await asyncio.gather(*(pool.ask(kinds[number % 3]) for number in range(18)))

    asyncio.run(test())
    assert most == connections


def test_what_takes_long_leaves_connections_to_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever waits for room is told that the server is there."""
    monkeypatch.setattr(http, "WORKING_SECONDS", 1.0)
    monkeypatch.setattr(http, "REPORT_SECONDS", 0.1)
    monkeypatch.setattr(pools, "REPORT_SECONDS", 0.1)
    told = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            if (await reader.readuntil(b"\r\n\r\n")).startswith(b"PUT"):
                await told.wait()
            writer.write(OK + b"content-length: 0\r\n\r\n")

    async def test() -> None:
        async with asyncio.timeout(OUTER), pool_to(serve, 4) as pool:
            changes = [
                asyncio.create_task(pool.ask(replace(CHANGE, silence=OUTER))) for _ in range(12)
            ]
            await asyncio.sleep(0)
            await pool.ask(LOOK)
            await pool.ask(ASK)
            assert not any(change.done() for change in changes)
            changes.append(asyncio.create_task(pool.ask(replace(CHANGE, alive=told.set))))
            await asyncio.gather(*changes)

    asyncio.run(test())


def test_the_users_limits_reach_the_site(tmp_path: Any) -> None:
    async def test() -> None:
        site = S3Site("http://127.0.0.1:1", connections=5, requests=40)
        spec = SiteSpec(site, {"ns": S3Root("bucket")}, str(tmp_path), 1000, 1000)
        connection = S3SiteConnection(spec)
        access = connection.remote("ns")._bucket._access
        assert (access.gate.slots, access.direct._limits.connections) == (5, 5)
        pacing, now = access.pacing, asyncio.get_running_loop().time

        async def nothing() -> None:
            """No request."""

        began = now()
        await asyncio.gather(*(pacing.asked(nothing) for _ in range(40)))
        assert now() - began > 0.5, "but for a burst they take a second"
        await connection.close()

    asyncio.run(test())
