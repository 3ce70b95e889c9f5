"""Servers that refuse what others do, as versitygw: a relay before a complete one plays them."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import Changed, Conflict, IsADirectory, RemoteError, WrongSettings
from hpcfs.remotes.base import no_report
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.remotes.s3.objects import Info
from hpcfs.remotes.s3.remote import S3Remote
from tests.remotes.test_s3_direct import put, remote_of
from tests.support.relay import Asked, refusal, relay_before
from tests.support.s3 import S3Server

LONG = "n" * 250


@asynccontextmanager
async def without_copies_of_markers(
    server: S3Server, prefix: str, cache: Path
) -> AsyncIterator[S3Remote]:
    """CopyObject of "a/" is refused."""

    def own(asked: Asked) -> bytes | None:
        copied = asked.method == "PUT" and "x-amz-copy-source: " in asked.head
        source = asked.head.partition("x-amz-copy-source: ")[2].partition("\r\n")[0]
        if copied and source.endswith("/"):
            return refusal(400, "DirectoryObjectContainsData")
        return None

    async with (
        relay_before(server) as relay,
        remote_of(relay.server, prefix, cache=str(cache)) as remote,
    ):
        relay.own = own
        yield remote


def test_directories_are_renamed_where_markers_are_not_copied(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with without_copies_of_markers(moto, prefix, tmp_path) as remote:
            await remote.connect()
            for path in (b"d", b"d/empty", b"d/sub", b"alone"):
                await remote.make_directory(path, 0o750)
            put(moto, f"{prefix}/d/sub/f", b"data")
            await remote.set_attributes(b"d", Attributes(mtime_ns=5 * 10**9))
            await remote.rename(b"d", b"e", replace=False, report=no_report)
            await remote.rename(b"alone", b"alone2", replace=False, report=no_report)
            for path in (b"e", b"e/empty", b"e/sub", b"alone2"):
                assert stat.S_IMODE((await remote.stat(path)).mode) == 0o750
            assert (await remote.stat(b"e")).mtime_ns == 5 * 10**9
            assert (await remote.stat(b"e/sub/f")).size == 4
            names = {entry.name async for page in remote.list(b"") for entry in page}
            assert names == {b"e", b"alone2"}

    asyncio.run(test())


@asynccontextmanager
async def without_replacing_long_names(
    server: S3Server, prefix: str, cache: Path
) -> AsyncIterator[S3Remote]:
    """An object with a long name can't be replaced: it is taken for a directory."""
    there: set[str] = set()

    def own(asked: Asked) -> bytes | None:
        key = asked.target.partition("?")[0]
        if LONG not in key:
            return None
        if asked.method == "DELETE":
            there.discard(key)
        elif asked.method == "PUT":
            source = asked.head.partition("x-amz-copy-source: ")[2].partition("\r\n")[0]
            if key in there and not key.endswith(source or "\0"):
                return refusal(409, "ExistingObjectIsDirectory")
            there.add(key)
        return None

    async with (
        relay_before(server) as relay,
        remote_of(relay.server, prefix, cache=str(cache)) as remote,
    ):
        relay.own = own
        yield remote


def test_what_can_not_be_replaced_is_removed_first(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with without_replacing_long_names(moto, prefix, tmp_path) as remote:
            bucket, key = remote._bucket, f"{prefix}/{LONG}"
            await bucket.put(key, b"first", Metadata(), {})
            entry = await remote.truncate(LONG.encode(), 2)
            assert entry.size == 2
            etag = await bucket.put(key, b"third", Metadata(), {}, base=entry.version)
            found = await bucket.head(key)
            assert found is not None
            assert (found.etag, found.size) == (etag, 5)
            with pytest.raises(Conflict):
                await bucket.put(key, b"fourth", Metadata(), {}, base=entry.version)
            await bucket.put(f"{prefix}/short", b"moved", Metadata(), {})
            await remote.rename(b"short", LONG.encode(), replace=True, report=no_report)
            found = await bucket.head(key)
            assert found is not None
            assert bytes(await bucket.get(key, found.version, 0, 5)) == b"moved"

    asyncio.run(test())


def test_nothing_is_removed_where_it_is_a_directory(moto: S3Server, prefix: str) -> None:
    """Or where the object would be copied onto itself."""

    async def test() -> None:
        async with relay_before(moto) as relay, remote_of(relay.server, prefix) as remote:
            key = f"{prefix}/k"
            relay.own = lambda asked: (
                refusal(409, "ExistingObjectIsDirectory") if asked.method == "PUT" else None
            )
            with pytest.raises(IsADirectory):
                await remote._bucket.put(key, b"x", Metadata(), {})
            put(moto, key, b"data")
            with pytest.raises(IsADirectory):
                await remote._bucket.copy(Info(key, 4, "", 0), key)
            assert relay.count("DELETE") == 0

    asyncio.run(test())


# --- answers that call themselves web pages -------------------------------------------------------

DELETED = b"<?xml version='1.0' encoding='UTF-8'?>\n<DeleteResult/>"
XHTML = b"<?xml version='1.0' encoding='UTF-8'?>\n<html><body>Log in first</body></html>"


def test_xml_that_calls_itself_a_web_page_is_read(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    """As OpenStack Swift's answer to a deletion of many; a portal's page stays one."""
    answer = DELETED

    def own(asked: Asked) -> bytes | None:
        if asked.method != "POST":
            return None
        kind = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=UTF-8\r\n"
        return f"{kind}Content-Length: {len(answer)}\r\n\r\n".encode() + answer

    async def test() -> None:
        nonlocal answer
        async with (
            relay_before(moto) as relay,
            remote_of(relay.server, prefix, cache=str(tmp_path)) as remote,
        ):
            relay.own = own
            await remote._bucket.delete_many([f"{prefix}/f"])
            for page in (XHTML, XHTML.partition(b"\n")[2]):
                answer = page
                with pytest.raises(RemoteError, match="web page"):
                    await remote._bucket.delete_many([f"{prefix}/f"])

    asyncio.run(test())


# --- answers in a row -----------------------------------------------------------------------------


def test_errors_with_other_answers_between_are_not_in_a_row(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    """So two damaged answers on different days are not believed."""
    put(moto, f"{prefix}/f", b"data")

    answer: bytes | None = None

    async def test() -> None:
        nonlocal answer
        async with (
            relay_before(moto) as relay,
            remote_of(relay.server, prefix, cache=str(tmp_path)) as remote,
        ):
            bucket = remote._bucket
            found = await bucket.head(f"{prefix}/f")
            assert found is not None
            relay.own = lambda asked: answer
            for code, kind in (
                ("NoSuchBucket", WrongSettings),
                ("NoSuchKey", Changed),
                ("NoSuchBucket", WrongSettings),
            ):
                answer = refusal(404, code)
                with pytest.raises(kind):
                    await bucket.get(f"{prefix}/f", found.version, 0, 4)
            answer = None
            assert await bucket.get(f"{prefix}/f", found.version, 0, 4) == b"data"

    asyncio.run(test())
