"""Bytes that are read are compared with what the server says of the whole object."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import zlib
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from hpcfs.model.errors import RemoteFailure
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.direct import THREAD_BYTES
from tests.remotes.test_s3_direct import put, remote_of
from tests.support.relay import Asked, Relay, relay_before
from tests.support.s3 import S3Server

SMALL, LARGE = Random(1).randbytes(1000), Random(2).randbytes(2 * THREAD_BYTES)
Story = Callable[[Bucket, Relay], Awaitable[None]]


def flip(answer: bytes) -> bytes:
    """One bit, in the middle of the body."""
    at = len(answer) - (len(answer) - answer.index(b"\r\n\r\n")) // 2
    return answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :]


def told(server: S3Server, story: Story) -> None:
    async def test() -> None:
        async with relay_before(server) as relay, remote_of(relay.server, "") as remote:
            await story(remote._bucket, relay)

    asyncio.run(test())


async def whole(bucket: Bucket, key: str, data: bytes) -> bytes:
    info = await bucket.head(key)
    assert info is not None
    return bytes(await bucket.get(key, info.version, 0, len(data)))


def gets(relay: Relay) -> int:
    return relay.count("GET", "/f")


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_a_flipped_bit_is_not_given_out(server: S3Server, prefix: str, data: bytes) -> None:
    put(server, f"{prefix}/f", data)

    async def story(bucket: Bucket, relay: Relay) -> None:
        def spoil(asked: Asked, answer: bytes) -> bytes:
            return flip(answer) if gets(relay) == 1 else answer

        relay.spoil = spoil
        assert await whole(bucket, f"{prefix}/f", data) == data
        assert gets(relay) == 2

    told(server, story)


def _always(asked: Asked, answer: bytes) -> bytes:
    return flip(answer) if asked.method == "GET" else answer


def test_bytes_that_stay_wrong_are_an_error(server: S3Server, prefix: str) -> None:
    """A link that damages them does so each time in another place."""
    for name in ("f", "g"):
        put(server, f"{prefix}/{name}", SMALL)

    async def story(bucket: Bucket, relay: Relay) -> None:
        def damage(asked: Asked, answer: bytes) -> bytes:
            if asked.method != "GET":
                return answer
            at = len(answer) - gets(relay)
            return answer[:at] + bytes([answer[at] ^ 1]) + answer[at + 1 :]

        assert await whole(bucket, f"{prefix}/g", SMALL) == SMALL
        relay.spoil = damage
        with pytest.raises(RemoteFailure, match=r"/f: what arrives is not what S3 says"):
            await whole(bucket, f"{prefix}/f", SMALL)
        relay.spoil = lambda asked, answer: answer
        assert await whole(bucket, f"{prefix}/f", SMALL) == SMALL

    told(server, story)


def test_an_etag_that_is_stale_hides_no_file(
    moto: S3Server, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As where programs write to the directory that a gateway serves: others' ETags are MD5s. The
    log says so once, and each such object is read twice only once."""
    for name in ("f", "g", "h"):
        put(moto, f"{prefix}/{name}", SMALL)

    async def story(bucket: Bucket, relay: Relay) -> None:
        assert await whole(bucket, f"{prefix}/g", SMALL) == SMALL
        relay.spoil = _always  # the same bytes each time, of which the ETag is none
        stale = flip(b"\r\n\r\n" + SMALL)[4:]
        with caplog.at_level(logging.WARNING, "hpcfs.remotes.s3.reading"):
            for asked in (2, 3, 4):
                assert await whole(bucket, f"{prefix}/f", SMALL) == stale
                assert gets(relay) == asked
            assert await whole(bucket, f"{prefix}/h", SMALL) == stale
        assert sum("is not the MD5" in record.message for record in caplog.records) == 1
        relay.spoil = lambda asked, answer: answer
        assert await whole(bucket, f"{prefix}/g", SMALL) == SMALL

    told(moto, story)


def test_etags_that_are_no_md5s_are_found_out(moto: S3Server, prefix: str) -> None:
    """By the same bytes that come twice, while no ETag was one yet."""
    put(moto, f"{prefix}/f", SMALL)
    real, other = hashlib.md5(SMALL).hexdigest().encode(), b"0" * 32

    async def story(bucket: Bucket, relay: Relay) -> None:
        relay.rewrite = lambda head: head.replace(other.decode(), real.decode())
        relay.spoil = lambda asked, answer: answer.replace(real, other)
        for asked in (2, 3, 4):
            assert await whole(bucket, f"{prefix}/f", SMALL) == SMALL
            assert gets(relay) == asked

    told(moto, story)


SAID = {
    "x-amz-checksum-crc32": zlib.crc32(SMALL).to_bytes(4, "big"),
    "x-amz-checksum-sha1": hashlib.sha1(SMALL).digest(),
    "x-amz-checksum-sha256": hashlib.sha256(SMALL).digest(),
}


@pytest.mark.parametrize("name", SAID)
def test_a_checksum_counts_before_the_etag(moto: S3Server, prefix: str, name: str) -> None:
    put(moto, f"{prefix}/f", SMALL)
    checksum = base64.b64encode(SAID[name])

    async def story(bucket: Bucket, relay: Relay) -> None:
        header = b"\r\n" + name.encode() + b": " + checksum
        relay.spoil = lambda asked, answer: answer.replace(b"\r\n", header + b"\r\n", 1)
        assert await whole(bucket, f"{prefix}/f", SMALL) == SMALL
        assert "x-amz-checksum-mode: enabled" in relay.asked[-1].head
        relay.spoil = lambda asked, answer: _always(
            asked, answer.replace(b"\r\n", header + b"\r\n", 1)
        )
        with pytest.raises(RemoteFailure):
            await whole(bucket, f"{prefix}/f", SMALL)
        of_parts = header.replace(checksum, checksum + b"-1")
        relay.spoil = lambda asked, answer: answer.replace(b"\r\n", of_parts + b"\r\n", 1)
        assert await whole(bucket, f"{prefix}/f", SMALL) == SMALL

    told(moto, story)


def test_a_part_of_an_object_is_compared_with_nothing(server: S3Server, prefix: str) -> None:
    put(server, f"{prefix}/f", SMALL)

    async def story(bucket: Bucket, relay: Relay) -> None:
        info = await bucket.head(f"{prefix}/f")
        assert info is not None
        assert bytes(await bucket.get(f"{prefix}/f", info.version, 5, 10)) == SMALL[5:15]
        assert gets(relay) == 1

    told(server, story)
