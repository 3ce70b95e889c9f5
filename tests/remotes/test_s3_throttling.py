"""A server that asks to slow down is waited for, by all who use the site, and not for ever."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from hpcfs.model.errors import Changed, DirectoryNotEmpty, NotFound, Throttled, Unreachable
from hpcfs.remotes import life
from hpcfs.remotes.base import no_report
from hpcfs.remotes.s3 import pacing
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.remotes.s3.pacing import LONGEST, LONGEST_ASKED, Pacing, retry_after
from hpcfs.remotes.s3.remote import S3Remote
from tests.remotes.test_s3_direct import put, remote_of
from tests.remotes.test_s3_fuzz import ACTS, Fuzz
from tests.support.relay import Asked, Relay, refusal, relay_before
from tests.support.s3 import S3Server

LIMITS = {
    "503 SlowDown": refusal(503, "SlowDown"),
    "503": refusal(503, ""),
    "429": refusal(429, ""),
    "429 TooManyRequests": refusal(429, "TooManyRequests"),
    "400 RequestLimitExceeded": refusal(400, "RequestLimitExceeded"),
    "503 with Retry-After": refusal(503, "SlowDown", "Retry-After: 1"),
}


def for_a_while(relay: Relay, answer: bytes, seconds: float) -> None:
    """From the first request on."""
    ends: list[float] = []

    def own(asked: Asked) -> bytes | None:
        if not ends:
            ends.append(time.monotonic() + seconds)
        return answer if time.monotonic() < ends[0] else None

    relay.own = own


async def _parts(remote: S3Remote) -> None:
    bucket = remote._bucket
    upload = await bucket.create_upload("parts", Metadata(), {})
    body = os.urandom(1 << 20)
    part = await bucket.upload_part("parts", upload, 1, body)
    await bucket.complete_upload("parts", upload, [part])
    found = await bucket.head("parts")
    assert found is not None
    assert bytes(await bucket.get("parts", found.version, 0, len(body))) == body


async def _everything(remote: S3Remote) -> None:
    await remote.connect()
    entry = await remote.stat(b"f")
    assert b"".join(await remote.fetch(b"f", entry.version, 0, 4, 1)) == b"data"
    assert [entry.name async for page in remote.list(b"") for entry in page] == [b"f"]
    await remote.make_directory(b"d", 0o755)
    await remote.make_symlink(b"d/l", b"target")
    await remote.rename(b"d", b"e", replace=False, report=no_report)
    await remote.remove(b"e/l")
    await remote.remove_directory(b"e")
    await _parts(remote)
    with pytest.raises(NotFound):
        await remote.stat(b"missing")


@pytest.mark.parametrize("answer", LIMITS.values(), ids=LIMITS)
def test_a_rate_limit_is_waited_for(
    moto: S3Server, prefix: str, answer: bytes, tmp_path: Path
) -> None:
    put(moto, f"{prefix}/f", b"data")

    async def test() -> None:
        async with (
            relay_before(moto) as relay,
            remote_of(relay.server, prefix, cache=str(tmp_path)) as remote,
        ):
            for_a_while(relay, answer, 0.8)
            await _everything(remote)

    asyncio.run(test())


def test_a_server_that_refuses_every_other_time_is_waited_for(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    put(moto, f"{prefix}/f", b"data")

    async def test() -> None:
        async with (
            relay_before(moto) as relay,
            remote_of(relay.server, prefix, cache=str(tmp_path)) as remote,
        ):
            relay.own = lambda asked: LIMITS["503 SlowDown"] if len(relay.asked) % 2 else None
            await _everything(remote)

    asyncio.run(test())


def test_what_nobody_limited_does_not_fail(moto: S3Server, prefix: str) -> None:
    """One key is refused for ever, the others are read meanwhile."""
    for name in ("limited", "f", "g"):
        put(moto, f"{prefix}/{name}", b"data")

    async def test() -> None:
        refused = asyncio.Event()

        def own(asked: Asked) -> bytes | None:
            if "/limited" not in asked.target:
                return None
            refused.set()
            return LIMITS["503"]

        async with relay_before(moto) as relay, remote_of(relay.server, prefix) as remote:
            relay.own = own
            limited = asyncio.create_task(remote.stat(b"limited"))
            await asyncio.wait_for(refused.wait(), 10)
            for _ in range(3):
                for name in (b"f", b"g"):
                    assert (await remote.stat(name)).size == 4
            limited.cancel()
            await asyncio.wait([limited])

    asyncio.run(test())


def test_single_keys_of_a_deletion_of_many_are_deleted_again(moto: S3Server, prefix: str) -> None:
    keys = [f"{prefix}/{number}" for number in range(5)]
    for key in keys:
        put(moto, key)
    slow = "".join(
        f"<Error><Key>{key}</Key><Code>SlowDown</Code><Message>m</Message></Error>"
        for key in keys[:2]
    )
    body = f"<DeleteResult>{slow}</DeleteResult>"
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    async def test() -> None:
        async with relay_before(moto) as relay, remote_of(relay.server, prefix) as remote:
            relay.own = lambda asked: answer if relay.count("POST", "delete") == 1 else None
            await remote._bucket.delete_many(keys)
            first, second = [asked.body for asked in relay.asked if asked.method == "POST"]
            assert all(key.encode() in first for key in keys)
            assert [key.encode() in second for key in keys] == [True, True, False, False, False]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("answer", "kind"), [(LIMITS["429"], Throttled), (LIMITS["503"], Unreachable)]
)
def test_it_ends(
    moto: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch, answer: bytes, kind: type
) -> None:
    """With an error that is the request's own: what is asked next is asked."""
    monkeypatch.setattr(pacing, "PATIENCE", 0.5)
    monkeypatch.setattr(pacing, "UNAVAILABLE_SECONDS", 0.5)

    async def test() -> None:
        async with relay_before(moto) as relay, remote_of(relay.server, prefix) as remote:
            relay.own = lambda asked: answer
            began = time.monotonic()
            with pytest.raises(kind, match=r"slow down|not available"):
                await remote._bucket.head("k")
            assert time.monotonic() - began < 5
            if kind is Throttled:
                count = len(relay.asked)
                with pytest.raises(Throttled):
                    await remote._bucket.head("k")
                assert len(relay.asked) > count

    asyncio.run(test())


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["the first answer", "30% of all answers"])
def test_every_operation_outlasts_refusals(
    rclone: S3Server, prefix: str, tmp_path: Path, share: float
) -> None:
    async def test() -> None:
        async with relay_before(rclone) as relay:
            fuzz = Fuzz(relay, prefix, tmp_path, 1)
            for number, (name, (before, act)) in enumerate(ACTS.items()):
                path = b"f%d" % number
                await before(fuzz.remote, path)
                asked = len(relay.asked)

                def own(_: Asked, asked: int = asked) -> bytes | None:
                    first = len(relay.asked) == asked + 1
                    return LIMITS["429"] if first or fuzz.random.random() < share else None

                relay.own = own
                signs: list[str] = []
                with life.reported_to(partial(signs.append, name)):
                    try:
                        await act(fuzz.remote, path)
                    except (NotFound, Changed, DirectoryNotEmpty):  # so it should be
                        assert name in ("stat of nothing", "read a part", "rmdir")
                assert signs, "the mount hears that the server is there"
                relay.own = lambda asked: None
            await fuzz.site.close()

    asyncio.run(test())


# --- the pauses, without a server -----------------------------------------------------------------


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(pacing.asyncio, "sleep", self.sleep)

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def slow_down(**headers: str) -> ClientError:
    about: Any = {"HTTPStatusCode": 503, "HTTPHeaders": headers}
    return ClientError({"Error": {"Code": "SlowDown"}, "ResponseMetadata": about}, "HeadObject")


Ask = Callable[[], Awaitable[str]]


def refusing(times: int, clock: Clock, error: ClientError) -> tuple[Ask, list[float]]:
    asked: list[float] = []

    async def ask() -> str:
        asked.append(clock())
        if len(asked) <= times:
            raise error
        return "answer"

    return ask, asked


def test_pauses_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ask, asked = refusing(1000, clock, slow_down())
    with pytest.raises(ClientError):
        asyncio.run(Pacing(clock).asked(ask))
    pauses = [later - sooner for sooner, later in pairwise(asked)]
    assert pauses[0] < 0.2 < LONGEST / 2 <= max(pauses) <= 1.5 * LONGEST
    assert clock() - 1000 <= pacing.PATIENCE
    assert len(asked) < 60


def test_who_is_refused_makes_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    site = Pacing(clock)
    limited, _ = refusing(3, clock, slow_down())
    free, asked = refusing(0, clock, slow_down())

    async def test() -> None:
        site._refused(clock(), 2.0)
        await site.asked(free)
        assert asked[0] >= 1002
        assert await site.asked(limited) == "answer"
        assert site._pause == 0

    asyncio.run(test())


def test_what_the_server_asks_for_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for said, least, most in (("3", 3, 3.2), ("99999", LONGEST_ASKED, LONGEST_ASKED + 0.2)):
        start = clock()
        ask, _ = refusing(1, clock, slow_down(**{"retry-after": said}))
        assert asyncio.run(Pacing(clock).asked(ask)) == "answer"
        assert least <= clock() - start <= most


def test_a_server_that_refuses_some_only_is_not_waited_for_by_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    site = Pacing(clock)
    free, asked = refusing(0, clock, slow_down())

    async def test() -> None:
        for _ in range(6):
            site._refused(clock(), 0.0)
            clock.now += 0.01
        assert site._paused_until > clock() + 0.1
        site._accepted()
        began = clock()
        await site.asked(free)
        assert asked == [began]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0),
        ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0),
        ("soon", 0.0),
        ("-5", 0.0),
        ("9" * 400, 999999999.0),
        ("", 0.0),
    ],
)
def test_both_forms_of_retry_after_are_understood(said: str, seconds: float) -> None:
    assert retry_after(slow_down(**{"retry-after": said}), lambda: 60.0) == seconds
