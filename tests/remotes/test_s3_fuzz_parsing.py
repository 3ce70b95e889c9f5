"""Damaged answers without a network: every request of a bucket, as fast as it can be parsed.

Each damaged answer ends in a value or a RemoteError, and the next right one is understood.
HPCFS_FUZZ_SECONDS and HPCFS_FUZZ_SEED as in test_s3_fuzz.py.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hpcfs.model.errors import RemoteError
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.remotes.s3 import pacing
from hpcfs.remotes.s3.bucket import Bucket, MultipartSession
from hpcfs.remotes.s3.checksums import PartSent
from hpcfs.remotes.s3.http import HttpConnection, HttpRequest, HttpResponse
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.remotes.s3.objects import Summary
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.support.spoiled import spoil

SECONDS = float(os.environ.get("HPCFS_FUZZ_SECONDS", "5"))
DATA = b"0123456789"
MD5 = "781e5e245d69b566979b86e28d23f2c7"
OTHER_MD5 = "d41d8cd98f00b204e9800998ecf8427e"
UPLOAD = MultipartSession("upload")
THERE = Summary("k", 10, MD5, 0)
OBJECT = (
    f'ETag: "{MD5}"',
    "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT",
    "Date: Sun, 06 Nov 1994 08:49:37 GMT",
    "Content-Type: text/plain",
    "x-amz-meta-mode: 33188",
    "x-amz-meta-mtime: 784111777.5",
    "x-amz-tagging-count: 1",
    "x-amz-object-lock-retain-until-date: 2030-01-01T00:00:00Z",
    "Expires: Sun, 06 Nov 1994 08:49:37 GMT",
)
LISTING = (
    "<ListBucketResult><Name>b</Name><Prefix>p/</Prefix><KeyCount>2</KeyCount>"
    "<IsTruncated>false</IsTruncated><EncodingType>url</EncodingType>"
    "<Contents><Key>p/a%20b</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>"
    f'<ETag>"{MD5}"</ETag><Size>10</Size><StorageClass>STANDARD</StorageClass></Contents>'
    "<CommonPrefixes><Prefix>p/d/</Prefix></CommonPrefixes></ListBucketResult>"
)
PARTS = (
    "<ListPartsResult><IsTruncated>false</IsTruncated><Part><PartNumber>1</PartNumber>"
    f'<ETag>"{MD5}"</ETag><Size>10</Size></Part></ListPartsResult>'
)
COPIED = f'<ETag>"{MD5}"</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified>'


def said(body: str | bytes = "", *headers: str, status: int = 200, bodiless: bool = False) -> bytes:
    raw = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} OK", f"Content-Length: {len(raw)}", *headers]
    return "\r\n".join([*lines, "\r\n"]).encode() + (b"" if bodiless else raw)


async def _pages(bucket: Bucket) -> None:
    async for _ in bucket.pages("p/", delimiter="/"):
        pass


Ask = Callable[[Bucket], Awaitable[Any]]
REQUESTS: dict[str, tuple[Ask, bytes]] = {
    "head": (lambda bucket: bucket.head("k"), said(DATA, *OBJECT, bodiless=True)),
    "get": (
        lambda bucket: bucket.get("k", MD5.encode(), 0, 10),
        said(DATA, *OBJECT, "Content-Range: bytes 0-9/10", status=206),
    ),
    "list": (lambda bucket: bucket.first("p/", 3), said(LISTING)),
    "list all": (_pages, said(LISTING)),
    "put": (lambda bucket: bucket.put("k", DATA, Metadata(), {}), said("", f'ETag: "{MD5}"')),
    "copy": (
        lambda bucket: bucket.copy(THERE, "l", Metadata(), {}),
        said(f"<CopyObjectResult>{COPIED}</CopyObjectResult>"),
    ),
    "delete": (lambda bucket: bucket.delete("k"), said(status=204)),
    "delete many": (
        lambda bucket: bucket.delete_many(["k", "l"]),
        said("<DeleteResult></DeleteResult>"),
    ),
    "begin": (
        lambda bucket: bucket.create_upload("k", Metadata(), {}),
        said(
            "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>u</UploadId>"
            "</InitiateMultipartUploadResult>"
        ),
    ),
    "part": (
        lambda bucket: bucket.upload_part("k", UPLOAD, 1, DATA),
        said("", f'ETag: "{MD5}"'),
    ),
    "copy a part": (
        lambda bucket: bucket.copy_part("k", UPLOAD, 1, THERE, 0, 10),
        said(f"<CopyPartResult>{COPIED}</CopyPartResult>"),
    ),
    "parts": (lambda bucket: bucket.parts("k", UPLOAD), said(PARTS)),
    "complete": (
        lambda bucket: bucket.complete_upload("k", UPLOAD, [PartSent(MD5)]),
        said(
            "<CompleteMultipartUploadResult><Bucket>b</Bucket><Key>k</Key>"
            f'<ETag>"{MD5}-1"</ETag></CompleteMultipartUploadResult>'
        ),
    ),
    "abort": (lambda bucket: bucket.abort_upload("k", UPLOAD), said(status=204)),
    "tags": (
        lambda bucket: bucket.call("get_object_tagging", "k", Key="k"),
        said("<Tagging><TagSet><Tag><Key>a</Key><Value>b</Value></Tag></TagSet></Tagging>"),
    ),
}

QUICK = ("head", "get", "list", "list all", "put", "copy", "part")
"""Those that botocore's machinery does not slow down: more of them."""


class Wire:
    """A pool of one connection, on which each answer comes in pieces and then ends."""

    secure = False
    host = "http://server"

    def __init__(self, generator: random.Random) -> None:
        self.answers: list[bytes] = []
        self._random = generator

    async def ask(self, request: HttpRequest) -> HttpResponse:
        answer = self.answers.pop() if self.answers else b""
        connection = HttpConnection(lambda _: None)
        connection.connection_made(cast(Any, SilentTransport()))
        asking = asyncio.create_task(connection.ask(request))
        await asyncio.sleep(0)
        self._feed(connection, answer)
        connection.connection_lost(None)
        return await asking

    def _feed(self, connection: HttpConnection, answer: bytes) -> None:
        position, whole = 0, self._random.random() < 0.5
        while position < len(answer) and connection.reusable and connection.busy:
            room = connection.get_buffer(-1)
            most = len(room) if whole else min(len(room), self._random.randrange(1, 400))
            piece = answer[position : position + most]
            room[: len(piece)] = piece
            position += len(piece)
            connection.buffer_updated(len(piece))

    def drop_idle(self) -> None:
        """There are none."""

    def close(self) -> None:
        """Nothing is open."""

    def __len__(self) -> int:
        return 0


class SilentTransport:
    """Takes whatever is written."""

    def write(self, data: bytes) -> None:
        """Forget it."""

    def abort(self) -> None:
        """Nothing is open."""

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int) -> None:
        """There is no limit."""


def bucket_on(wire: Wire, state: str) -> tuple[S3SiteConnection, Bucket]:
    site = S3Site("http://127.0.0.1:9", "us-east-1", None, Secret("A"), Secret("s"))
    connection = S3SiteConnection(SiteSpec(site, {"ns": S3Root("bucket")}, state, 1, 1))

    async def pool(_: object) -> Wire:
        return wire

    cast(Any, connection._direct)._pool = pool
    return connection, connection.remote("ns")._bucket


@pytest.mark.timeout(SECONDS + 240)
def test_every_answer_ends_in_a_value_or_an_error(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seed = int(os.environ.get("HPCFS_FUZZ_SEED", random.randrange(2**32)))
    generator = random.Random(seed)
    outcomes: Counter[tuple[str, str]] = Counter()
    clock = SimpleNamespace(now=0.0)

    async def sleep(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(pacing, "asyncio", SimpleNamespace(sleep=sleep))

    async def test() -> None:
        loop = asyncio.get_running_loop()
        wire = Wire(generator)
        connection, bucket = bucket_on(wire, str(tmp_path))
        bucket._access.pacing._clock = lambda: clock.now
        end = loop.time() + SECONDS
        while loop.time() < end:
            name = generator.choice(QUICK if generator.random() < 0.8 else list(REQUESTS))
            ask, answer = REQUESTS[name]
            damaged = spoil(generator, answer)
            wire.answers[:] = [damaged] * 3
            try:
                await ask(bucket)
                outcomes[name, "answered"] += 1
            except RemoteError as error:
                outcomes[name, type(error).__name__] += 1
            except Exception as error:
                raise AssertionError(f"seed {seed}, {name}: {damaged!r}") from error
            bucket._access.health.try_now()
            wire.answers[:] = [answer] * 3
            try:
                await ask(bucket)
            except RemoteError as error:
                raise AssertionError(f"seed {seed}, after {name}: {damaged!r}") from error
        await connection.close()

    asyncio.run(test())
    count = sum(outcomes.values())
    print(f"seed {seed}: {count} damaged answers", sorted(outcomes.items()))
    assert count > 0
    assert {name for name, _ in outcomes} == set(REQUESTS) or count < 200
    assert not [one for one in caplog.records if one.exc_info], "a traceback in the log"
