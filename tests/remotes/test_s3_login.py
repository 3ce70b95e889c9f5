"""As whom S3 is asked: with credentials, without, and not where a session token would be shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hpcfs.model.errors import AccessRefused, PermissionDenied, WrongSettings
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.remotes.base import no_report
from hpcfs.remotes.s3.login import S3Login, check_secrecy
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.signing import Keys
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.remotes.test_s3_direct import count, put
from tests.support.relay import relay_before
from tests.support.s3 import S3Server

TENANT = "team:bucket"


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@asynccontextmanager
async def remote_at(site: S3Site, bucket: str, cache: Path) -> AsyncIterator[S3Remote]:
    connection = S3SiteConnection(SiteSpec(site, {"ns": S3Root(bucket)}, str(cache), 1000, 1000))
    try:
        yield connection.remote("ns")
    finally:
        await connection.close()


@pytest.fixture
def public(moto: S3Server) -> S3Server:
    put(moto, "open/f", b"public", ACL="public-read")
    return moto


@pytest.mark.parametrize("asked_for", [True, False], ids=["anonymous = true", "no credentials"])
def test_a_public_bucket_is_read_without_credentials(
    public: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_for: bool
) -> None:
    """Directly, not by way of botocore, and without a word of the credentials that there are."""
    if asked_for:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    async def test() -> None:
        async with relay_before(public) as relay:
            url = relay.server.endpoint_url
            site = S3Site(url, "us-east-1", anonymous=asked_for)
            async with remote_at(site, public.bucket, tmp_path) as remote:
                by_botocore = count(remote)
                capabilities = await remote.connect()
                assert capabilities.remark == "without credentials, as anybody may"
                entry = await remote.stat(b"open/f")
                pieces = await remote.fetch(b"open/f", entry.version, 0, entry.size, 1)
                assert b"".join(pieces) == b"public"
                listed = [one.name async for page in remote.list(b"open") for one in page]
                assert listed == [b"f"]
                assert by_botocore == []
            assert relay.asked
            assert not any("authorization:" in asked.head for asked in relay.asked)
            assert not any("x-amz-security-token" in asked.head for asked in relay.asked)

    asyncio.run(test())


def test_a_bucket_that_is_not_public_says_so(rclone: S3Server, tmp_path: Path) -> None:
    """What was refused twice is not asked for again soon: one answer may be damaged."""

    async def test() -> None:
        async with relay_before(rclone) as relay:
            site = S3Site(relay.server.endpoint_url)
            async with remote_at(site, rclone.bucket, tmp_path) as remote:
                for _ in range(2):
                    with pytest.raises(AccessRefused, match=r"no usable.*is not public"):
                        await remote.connect()
                asked = len(relay.asked)
                with pytest.raises(AccessRefused, match=r"no usable.*is not public"):
                    await remote.connect()
                assert len(relay.asked) == asked

    asyncio.run(test())


def test_an_endpoint_that_is_no_url_is_told_of(tmp_path: Path) -> None:
    async def test() -> None:
        async with remote_at(S3Site("nonsense"), "bucket", tmp_path) as remote:
            with pytest.raises(WrongSettings, match="Invalid endpoint: nonsense"):
                await remote.connect()

    asyncio.run(test())


def test_a_profile_without_credentials_is_an_error(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who names one does not mean to be anonymous."""
    config = tmp_path / "config"
    config.write_text("[profile empty]\nregion = us-east-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    async def test() -> None:
        site = S3Site(rclone.endpoint_url, profile="empty")
        async with remote_at(site, rclone.bucket, tmp_path) as remote:
            with pytest.raises(AccessRefused, match="no usable S3 credentials"):
                await remote.connect()

    asyncio.run(test())


# --- names of buckets -----------------------------------------------------------------------------


def test_the_bucket_of_a_tenant(tmp_path: Path, moto: S3Server) -> None:
    """Ceph's form. A relay stands for a server that knows tenants: it takes the name away."""
    put(moto, "f", b"data")
    asked: list[str] = []

    async def test() -> None:
        async with relay_before(moto) as relay:
            relay.rewrite = lambda text: text.replace("team%3Abucket", moto.bucket)
            keys = (Secret(moto.access_key), Secret(moto.secret_key))
            site = S3Site(relay.server.endpoint_url, moto.region, None, *keys)
            async with remote_at(site, TENANT, tmp_path) as remote:
                await remote.connect()
                assert (await remote.stat(b"f")).size == 4
                await remote.rename(b"f", b"g", replace=False, report=no_report)
                await remote.rename(b"g", b"f", replace=False, report=no_report)
            asked.extend(one.target for one in relay.asked)

    asyncio.run(test())
    assert asked
    assert all(target.startswith("/team%3Abucket") for target in asked)


@pytest.mark.parametrize("separator", [":", "/"])
def test_an_access_point_is_asked_at_its_own_host(separator: str) -> None:
    name = f"arn:aws:s3:us-west-2:123456789012:accesspoint{separator}my-ap"

    async def test() -> Any:
        keys = (Secret("KEY"), Secret("secret"))
        login = S3Login(S3Site(None, "eu-west-1", None, *keys))
        request = await login.prepared(name)
        await login.close()
        return request

    request = asyncio.run(test())
    host = "my-ap-123456789012.s3-accesspoint.us-west-2.amazonaws.com"
    assert request.url.rstrip("/") == f"https://{host}"
    assert b"/us-west-2/s3/" in bytes(str(request.headers["Authorization"]), "ascii")


# --- http:// --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "remark"),
    [
        ("https://storage.example.org", ""),
        ("http://127.0.0.1:9000", ""),
        ("http://[::1]:9000", ""),
        ("http://localhost:9000", ""),
        ("http://storage.example.org", "not encrypted"),
        ("http://10.0.0.1:9000", "not encrypted"),
        ("http://127.0.0.1.example.org", "not encrypted"),
    ],
)
def test_an_endpoint_without_encryption_is_told(
    url: str, remark: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert check_secrecy(url, Keys("KEY", "secret", None)) == remark
    assert ("not encrypted" in caplog.text) == bool(remark)
    if remark:
        with pytest.raises(WrongSettings, match=r"session token.*https://"):
            check_secrecy(url, Keys("KEY", "secret", "token"))
    else:
        assert check_secrecy(url, Keys("KEY", "secret", "token")) == ""


def test_no_request_is_made_that_would_show_a_session_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")

    async def test() -> None:
        site = S3Site("http://storage.invalid", "us-east-1")
        async with remote_at(site, "bucket", tmp_path) as remote:
            with pytest.raises(WrongSettings, match="session token"):
                await remote.connect()
            with pytest.raises((WrongSettings, PermissionDenied)):
                await remote.stat(b"f")

    asyncio.run(test())
