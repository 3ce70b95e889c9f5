"""Tags, access lists and headers of objects stay, whatever is done with the file; and what that
costs in requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from hpcfs.model.entries import Attributes
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.base import no_report
from hpcfs.remotes.s3.objects import settable
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.tags_and_acls import parameters_of
from tests.remotes.test_s3 import Bytes
from tests.remotes.test_s3_direct import put, remote_of
from tests.support.relay import Asked, refusal, relay_before
from tests.support.s3 import S3Server

TAGS = [{"Key": "keep", "Value": "7 years"}, {"Key": "odd:key", "Value": "a=b+c@d"}]
TAGGING = "keep=7%20years&odd%3Akey=a%3Db%2Bc%40d"
HEADERS = {"ContentType": "text/x-model", "CacheControl": "no-cache", "ContentLanguage": "de"}


async def overwrite(remote: S3Remote, path: bytes, data: bytes, **fields: Any) -> None:
    source = Bytes(data)
    request = UploadRequest(path, source.size, 0, [(0, source.size)], Attributes(), 0o644, **fields)
    await remote.upload(request, source, no_report)


async def _edit(remote: S3Remote) -> bytes:
    await overwrite(
        remote, b"d/f", b"new content", base_version=(await remote.stat(b"d/f")).version
    )
    return b"d/f"


async def _replace(remote: S3Remote) -> bytes:
    """As in write = "back", where a file that was written beside is renamed over."""
    await overwrite(remote, b"d/f", b"new", replace=True)
    return b"d/f"


async def _truncate(remote: S3Remote) -> bytes:
    await remote.truncate(b"d/f", 2)
    return b"d/f"


async def _chmod(remote: S3Remote) -> bytes:
    await remote.set_attributes(b"d/f", Attributes(mode=0o600))
    return b"d/f"


async def _rename(remote: S3Remote) -> bytes:
    await remote.rename(b"d/f", b"g", replace=False)
    return b"g"


async def _rename_directory(remote: S3Remote) -> bytes:
    await remote.rename(b"d", b"e", replace=False)
    return b"e/f"


async def _rename_over(remote: S3Remote) -> bytes:
    await overwrite(remote, b"d/beside", b"new content")
    await remote.rename(b"d/beside", b"d/f", replace=True)
    return b"d/f"


async def _several(remote: S3Remote) -> bytes:
    """In a row, when what was done is remembered."""
    for work in (_chmod, _edit, _truncate, _chmod, _edit, _rename):
        path = await work(remote)
    return path


Work = Callable[[S3Remote], Awaitable[bytes]]
ALL: dict[str, Work] = {
    "edit": _edit,
    "truncate": _truncate,
    "chmod": _chmod,
    "rename": _rename,
    "rename of the directory": _rename_directory,
    "several": _several,
}
OVER: dict[str, Work] = {"rename over": _rename_over, "replace": _replace}


@asynccontextmanager
async def relayed(server: S3Server, prefix: str, cache: Path) -> AsyncIterator[Any]:
    async with (
        relay_before(server) as relay,
        remote_of(relay.server, prefix, cache=str(cache)) as remote,
    ):
        await remote.connect()
        yield relay, remote


def tags_and_acls(server: S3Server, key: str) -> tuple[Any, Any, Any]:
    """Tags, grants but the owner's, headers."""
    with server.client() as client:
        tags = client.get_object_tagging(Bucket=server.bucket, Key=key)["TagSet"]
        grants = client.get_object_acl(Bucket=server.bucket, Key=key)["Grants"]
        found = client.head_object(Bucket=server.bucket, Key=key)
    public = [
        (grant["Grantee"]["URI"].rpartition("/")[2], grant["Permission"])
        for grant in grants
        if "URI" in grant["Grantee"]
    ]
    return tags, public, {name: found.get(name) for name in (*HEADERS, "StorageClass")}


EXPECTED = (TAGS, [("AllUsers", "READ")], {**HEADERS, "StorageClass": "STANDARD_IA"})


def full(server: S3Server, prefix: str) -> None:
    extra: dict[str, Any] = {**HEADERS, "StorageClass": "STANDARD_IA", "ACL": "public-read"}
    put(server, f"{prefix}/d/f", b"content", Tagging=TAGGING, **extra)


def done(server: S3Server, prefix: str, cache: Path, work: Work) -> str:
    """Do it through a remote; the key of what it made."""

    async def story() -> str:
        async with remote_of(server, prefix, cache=str(cache)) as remote:
            await remote.connect()
            return f"{prefix}/{(await work(remote)).decode()}"

    return asyncio.run(story())


@pytest.mark.parametrize("work", ALL.values(), ids=ALL)
def test_they_stay_whatever_is_done(
    moto: S3Server, prefix: str, tmp_path: Path, work: Work
) -> None:
    full(moto, prefix)

    assert tags_and_acls(moto, done(moto, prefix, tmp_path, work)) == EXPECTED


@pytest.mark.parametrize("work", OVER.values(), ids=OVER)
def test_another_file_that_takes_the_name_takes_the_tags_only(
    moto: S3Server, prefix: str, tmp_path: Path, work: Work
) -> None:
    """Who may read the old file need not be meant to read that one."""
    full(moto, prefix)

    tags, public, _ = tags_and_acls(moto, done(moto, prefix, tmp_path, work))
    assert (tags, public) == (TAGS, [])


def test_directories_keep_theirs(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    put(moto, f"{prefix}/d/", Tagging=TAGGING, ACL="public-read")

    async def test() -> None:
        async with remote_of(moto, prefix, cache=str(tmp_path)) as remote:
            await remote.connect()
            await remote.set_attributes(b"d", Attributes(mode=0o700))
            await remote.rename(b"d", b"e", replace=False)

    asyncio.run(test())
    assert tags_and_acls(moto, f"{prefix}/e/")[:2] == (TAGS, [("AllUsers", "READ")])


def test_objects_without_tags_cost_no_request_for_them(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    put(moto, f"{prefix}/d/f", b"content")

    async def test() -> None:
        async with relayed(moto, prefix, tmp_path) as (relay, remote):
            await _several(remote)
            assert relay.count("tagging") == 0

    asyncio.run(test())


UNKNOWN = {
    "not implemented": lambda asked: "?acl" in asked.target and refusal(501, "NotImplemented"),
    "denied": lambda asked: "?acl" in asked.target and refusal(403, "AccessDenied"),
}


@pytest.mark.parametrize("own", UNKNOWN.values(), ids=UNKNOWN)
def test_a_server_without_access_lists_is_not_asked_for_them_again(
    moto: S3Server, prefix: str, tmp_path: Path, own: Callable[[Asked], Any]
) -> None:
    put(moto, f"{prefix}/d/f", b"content")

    async def test() -> None:
        async with relayed(moto, prefix, tmp_path) as (relay, remote):
            relay.own = lambda asked: own(asked) or None
            for _ in range(3):
                await _several(remote)
                await remote.rename(b"g", b"d/f", replace=False)
            assert 1 <= relay.count("?acl") <= 2  # of the bucket, and of one object
            assert relay.count("ownershipControls") == 1

    asyncio.run(test())


def test_a_fault_of_the_server_does_not_end_it(
    moto: S3Server, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full(moto, prefix)
    put(moto, f"{prefix}/d/g", b"content", ACL="public-read")

    async def test() -> None:
        async with relayed(moto, prefix, tmp_path) as (relay, remote):
            relay.own = lambda asked: (
                refusal(500, "InternalError") if "/g?acl" in asked.target else None
            )
            await remote.truncate(b"d/g", 2)
            await remote.truncate(b"d/f", 2)

    with caplog.at_level(logging.WARNING):
        asyncio.run(test())
    assert "d/g loses its access list" in caplog.text
    assert tags_and_acls(moto, f"{prefix}/d/f")[1] == [("AllUsers", "READ")]


def test_where_access_lists_are_switched_off_none_is_asked_for(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    """As on AWS by default."""
    put(moto, f"{prefix}/d/f", b"content")
    rule = "<Rule><ObjectOwnership>BucketOwnerEnforced</ObjectOwnership></Rule>"
    body = f"<OwnershipControls>{rule}</OwnershipControls>"
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()

    async def test() -> None:
        async with relayed(moto, prefix, tmp_path) as (relay, remote):
            relay.own = lambda asked: answer if "ownershipControls" in asked.target else None
            await _several(remote)
            assert (relay.count("?acl"), relay.count("ownershipControls")) == (0, 1)

    asyncio.run(test())


def test_rclones_server_costs_nothing_either(rclone: S3Server, prefix: str, tmp_path: Path) -> None:
    put(rclone, f"{prefix}/d/f", b"content")

    async def test() -> None:
        async with relayed(rclone, prefix, tmp_path) as (relay, remote):
            for _ in range(3):
                await _several(remote)
                await remote.rename(b"g", b"d/f", replace=False)
            assert relay.count("?acl") <= 1
            assert relay.count("tagging") == 0

    asyncio.run(test())


@pytest.mark.parametrize("status", [(403, "AccessDenied"), (501, "NotImplemented")])
@pytest.mark.parametrize("work", [_edit, _truncate])
def test_what_can_not_be_kept_is_said(
    moto: S3Server,
    prefix: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    work: Work,
    status: tuple[int, str],
) -> None:
    """And the file is written all the same."""
    full(moto, prefix)

    def own(asked: Asked) -> bytes | None:
        refused = asked.method == "PUT" and "x-amz-tagging" in asked.head
        return refusal(*status) if refused else None

    async def test() -> None:
        async with relayed(moto, prefix, tmp_path) as (relay, remote):
            relay.own = own
            await work(remote)

    with caplog.at_level(logging.WARNING):
        asyncio.run(test())
    assert "loses Tagging, ACL" in caplog.text
    assert tags_and_acls(moto, f"{prefix}/d/f")[0] == []


def test_an_access_list_for_single_users_is_told_as_it_was() -> None:
    owner = {"Grantee": {"Type": "CanonicalUser", "ID": "me"}, "Permission": "FULL_CONTROL"}
    other = {"Grantee": {"Type": "CanonicalUser", "ID": "you"}, "Permission": "READ"}
    group = {"Grantee": {"Type": "Group", "URI": "http://x/groups/some"}, "Permission": "READ"}
    assert parameters_of({"Owner": {"ID": "me"}, "Grants": [owner]}) == {"ACL": "private"}
    assert parameters_of({"Owner": {"ID": "me"}, "Grants": [owner, other, group]}) == {
        "GrantFullControl": 'id="me"',
        "GrantRead": 'id="you", uri="http://x/groups/some"',
    }


def test_a_lock_that_has_run_out_is_not_set_again() -> None:
    for days, kept in ((-1, set()), (1, {"ObjectLockMode", "ObjectLockRetainUntilDate"})):
        until = datetime.now(UTC) + timedelta(days=days)
        given = {"ObjectLockMode": "GOVERNANCE", "ObjectLockRetainUntilDate": until}
        given["ObjectLockLegalHoldStatus"] = "ON"
        assert settable(given).keys() == kept | {"ObjectLockLegalHoldStatus"}
