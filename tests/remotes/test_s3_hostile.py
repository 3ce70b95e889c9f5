"""A server that answers in order to hurt: its words are bounded in memory, and make no exception
that nobody foresaw. (Redirects and answers without end: test_s3_redirects.py.)"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from hpcfs.model.errors import AccessRefused, ProtocolError, RemoteFailure
from hpcfs.model.sites import S3Root, S3Site, SiteSpec
from hpcfs.remotes.s3.direct import Direct
from hpcfs.remotes.s3.http import HEAD_BYTES, MOST_INTERIM
from hpcfs.remotes.s3.objects import check_range
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.responses import MOST_MARKS, parse_listing
from hpcfs.remotes.s3.signing import Keys
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.remotes.test_s3_direct import remote_of
from tests.remotes.test_s3_redirects import FIRST, WAYS, Listener, listening
from tests.support.s3 import S3Server


def answer(body: bytes, status: int = 200, **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "\r\n"]).encode() + body


@asynccontextmanager
async def remote_at(said: bytes, way: str = "direct") -> AsyncIterator[tuple[S3Remote, Listener]]:
    """At a server that says this to everything."""
    async with listening(FIRST, said) as server, remote_of(S3Server(server.url), "") as remote:
        if way == "botocore":
            remote._bucket._access.direct._routes[remote._bucket.name] = None
        yield remote, server


def listing(inside: str) -> bytes:
    return f"<ListBucketResult>{inside}<IsTruncated>false</IsTruncated></ListBucketResult>".encode()


def bomb(root: str, size: int, encoding: str = "utf-8") -> bytes:
    """90 times as long once it is parsed: as far as expat goes."""
    text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE r [<!ENTITY e "{"x" * size}">]>'
    return f"{text}<{root}><Code>C</Code><Message>{'&e;' * 90}</Message></{root}>".encode(encoding)


UNFIT = {
    "entities": bomb("ListBucketResult", 50_000),
    "entities in UTF-16": bomb("ListBucketResult", 50_000, "utf-16"),
    "elements": listing("<a/>" * MOST_MARKS),
    "attributes": b"<ListBucketResult %s/>"
    % b" ".join(b"a%d='1'" % i for i in range(MOST_MARKS + 1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("body", UNFIT.values(), ids=UNFIT)
def test_an_answer_that_grows_when_parsed_is_refused(body: bytes, way: str) -> None:
    async def test() -> None:
        async with remote_at(answer(body), way) as (remote, _):
            with pytest.raises(ProtocolError, match="not safe to parse"):
                async for _ in remote.list(b""):
                    pass

    asyncio.run(test())


def test_a_page_of_a_server_that_gives_many_keys_is_read() -> None:
    key = (
        "<Contents><Key>some/key/{}</Key><Size>1</Size><ETag>e</ETag><StorageClass>S</StorageClass>"
    )
    page = listing("".join(f"{key.format(i)}</Contents>" for i in range(10_000)))
    assert len(parse_listing(page)["Contents"]) == 10_000


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_of_such_a_refusal_the_status_counts(encoding: str, way: str) -> None:
    body = bomb("Error", 25_000, encoding)

    async def test() -> None:
        async with remote_at(answer(body, 400), way) as (remote, _):
            with pytest.raises(RemoteFailure) as refused:
                await remote._bucket.get("k", b"e", 0, 9)
        assert "xxx" not in refused.value.message

    asyncio.run(test())


def test_a_long_explanation_is_cut() -> None:
    body = b"<Error><Code>C</Code><Message>" + b"m" * 60_000 + b"</Message></Error>"

    async def test() -> None:
        async with remote_at(answer(body, 400)) as (remote, _):
            with pytest.raises(RemoteFailure) as refused:
                await remote._bucket.get("k", b"e", 0, 9)
        assert "mmm" in refused.value.message
        assert len(refused.value.message) < 1100

    asyncio.run(test())


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_that_is_nested_too_deep_makes_no_sense(way: str) -> None:
    body = b"<Error>" + b"<a>" * 9_000 + b"</a>" * 9_000 + b"</Error>"

    async def test() -> None:
        async with remote_at(answer(body, 400), way) as (remote, _):
            with pytest.raises(ProtocolError, match="nested too deep"):
                await remote._bucket.get("k", b"e", 0, 9)

    asyncio.run(test())


NO_RANGE = ["bytes 0-8/²", f"bytes 0-8/{'1' * 5000}", f"bytes {'1' * 5000}-8/9", "bytes ٣-8/9"]


@pytest.mark.parametrize("said", NO_RANGE, ids=range(len(NO_RANGE)))
def test_a_range_that_is_none_is_no_failure_of_ours(said: str) -> None:
    """The first two name the right bytes of a file whose size is unknown."""
    parts = {"ContentLength": 9, "ContentRange": said}
    try:
        assert check_range("k", parts, 0, 9) == 9
    except ProtocolError:
        assert said in NO_RANGE[2:]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_xml_makes_no_sense(way: str) -> None:
    async def test() -> None:
        async with remote_at(answer(b"<<nothing>>", 206), way) as (remote, _):
            with pytest.raises(ProtocolError, match="can't be understood"):
                async for _ in remote.list(b""):
                    pass

    asyncio.run(test())


# --- times ----------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "before the first": "Mon, 01 Jan 0001 00:00:00 +1400",
    "after the last": "Fri, 31 Dec 9999 23:59:59 -1200",
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("time", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_time_that_no_file_has_is_none(time: str, way: str) -> None:
    said = answer(b"", Last_Modified=time, Date=time, ETag='"e"')

    async def test() -> None:
        async with remote_at(said, way) as (remote, _):
            found = await remote._bucket.head("k")
        assert found is not None
        assert abs(found.modified_ns) < 2**63

    asyncio.run(test())


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
def test_so_it_is_in_a_listing(time: str) -> None:
    said = listing(
        f"<Contents><Key>k</Key><Size>0</Size><LastModified>{time}</LastModified></Contents>"
    )

    async def test() -> None:
        async with remote_at(answer(said)) as (remote, _):
            page = await remote._bucket.first("", 1)
        assert [found.modified_ns for found in page.objects] == [0]

    asyncio.run(test())


# --- HTTP -----------------------------------------------------------------------------------------

INTERIM = b"HTTP/1.1 103 E\r\n\r\n"


def test_many_interim_answers_come_before_one() -> None:
    async def test() -> None:
        said = INTERIM * MOST_INTERIM + answer(b"", ETag='"e"')
        async with remote_at(said) as (remote, _):
            assert await remote._bucket.head("k")
            assert remote._bucket._access.direct._strange == {}

    asyncio.run(test())


def test_interim_answers_end() -> None:
    async def test() -> None:
        said = INTERIM * (HEAD_BYTES // len(INTERIM)) + answer(b"", ETag='"e"')
        async with remote_at(said) as (remote, _):
            bucket = remote._bucket
            found = await bucket._access.direct.answer("head_object", bucket.name, {"Key": "k"}, 0)
            assert found is None, "left to botocore"
            assert bucket._access.direct._strange == {bucket.name: 1}

    asyncio.run(test())


@pytest.mark.parametrize(
    "keys",
    [Keys("AKIA\r\nx-evil: 1", "s", None), Keys("AKIA", "s", "token\r\n\r\nDELETE / HTTP/1.1")],
    ids=["key", "token"],
)
def test_credentials_add_no_header(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may come from a server, too."""

    async def given() -> Keys:
        return keys

    async def test() -> None:
        async with remote_at(answer(b"", ETag='"e"')) as (remote, server):
            direct: Direct = remote._bucket._access.direct
            monkeypatch.setattr(direct._login, "keys", given)
            where: Mapping[str, str] = {"Key": "k"}
            assert await direct.answer("head_object", remote._bucket.name, where, 0) is None
            assert server.asked == []

    asyncio.run(test())


NO_CREDENTIALS = {
    "a header more": {"AccessKeyId": "AKIA\r\nx-evil: 1"},
    "no text": {"Token": ["t"]},
    "expired": {"Expiration": "1970-01-01T00:00:00Z"},
    "before all time": {"Expiration": "0001-01-01T00:00:00+14:00"},
    "after it": {"Expiration": "9" * 5000},
}


@pytest.mark.parametrize("wrong", NO_CREDENTIALS.values(), ids=NO_CREDENTIALS)
def test_a_provider_that_gives_no_credentials_is_told_of(
    wrong: Mapping[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {"AccessKeyId": "A", "SecretAccessKey": "s", "Token": "t", "Expiration": "2099-01-01"}
    said = answer(json.dumps({**right, **wrong}).encode())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)

    async def test() -> None:
        async with listening(FIRST, said) as provider, listening(FIRST, answer(b"")) as server:
            monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{provider.url}/c")
            site = S3Site(endpoint_url=server.url)
            spec = SiteSpec(site, {"data": S3Root("bucket", "")}, "/nonexistent", 1000, 1000)
            connection = S3SiteConnection(spec)
            with pytest.raises(AccessRefused, match="no usable S3 credentials"):
                await connection.remote("data").connect()
            await connection.close()
            assert provider.asked
            assert server.asked == []

    asyncio.run(test())


def test_an_encoding_that_nobody_knows_is_left_to_botocore() -> None:
    """Which takes it for UTF-8."""
    said = b'<?xml version="1.0" encoding="QTF-8"?>' + listing("")

    async def test() -> None:
        async with remote_at(answer(said)) as (remote, _):
            assert (await remote._bucket.first("", 1)).objects == []

    asyncio.run(test())
