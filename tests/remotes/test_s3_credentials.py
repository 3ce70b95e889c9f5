"""Credentials of S3 that are refused, expire or can't be had, and then are good again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from hpcfs.model.errors import AccessRefused, RemoteError
from hpcfs.model.sites import S3Root, S3Site, SiteSpec
from hpcfs.remotes.s3 import refusal
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.remotes.test_s3_direct import put
from tests.support.relay import Asked, Relay, refusal as refused_with, relay_before
from tests.support.s3 import S3Server

OLD = "[lab]\naws_access_key_id = OLDKEY\naws_secret_access_key = old\n"
EXPIRED = f"{OLD}aws_session_token = expired\n"
REFUSALS = [
    (403, "InvalidAccessKeyId"),
    (403, "SignatureDoesNotMatch"),
    (400, "ExpiredToken"),
    (403, "InvalidToken"),
]


class Credentials:
    """The user's ~/.aws, with a profile "lab"."""

    def __init__(self, directory: Path, server: S3Server) -> None:
        self.file = directory / "credentials"
        self.config = directory / "config"
        self.process = directory / "process"
        self._server = server
        self.write(OLD)
        self.config.write_text("")

    @property
    def good(self) -> str:
        server = self._server
        return (
            f"[lab]\naws_access_key_id = {server.access_key}\n"
            f"aws_secret_access_key = {server.secret_key}\n"
        )

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def by_process(self, output: str) -> None:
        self.write("")
        self.process.write_text(f"#!/bin/sh\ncat <<'E'\n{output}\nE\n")
        self.process.chmod(0o700)
        self.config.write_text(f"[profile lab]\ncredential_process = {self.process}\n")

    @property
    def good_output(self) -> str:
        server = self._server
        return (
            f'{{"Version": 1, "AccessKeyId": "{server.access_key}", '
            f'"SecretAccessKey": "{server.secret_key}"}}'
        )


@pytest.fixture
def credentials(rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Credentials:
    put(rclone, "lab/f", b"content")
    found = Credentials(tmp_path, rclone)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(found.file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(found.config))
    monkeypatch.setattr(refusal, "LOOK_SECONDS", 0.0)
    return found


@asynccontextmanager
async def as_lab(
    server: S3Server,
    tmp_path: Path,
    status: int = 403,
    code: str = "InvalidAccessKeyId",
    profile: str | None = "lab",
) -> AsyncIterator[tuple[S3SiteConnection, S3Remote, Relay]]:
    """A remote with the profile "lab", whose old key the server refuses."""

    def own(asked: Asked) -> bytes | None:
        return refused_with(status, code) if "credential=oldkey/" in asked.head else None

    async with relay_before(server) as relay:
        relay.own = own
        site = S3Site(relay.server.endpoint_url, server.region, profile=profile)
        root = S3Root(server.bucket, "lab")
        connection = S3SiteConnection(SiteSpec(site, {"ns": root}, str(tmp_path), 1000, 1000))
        try:
            yield connection, connection.remote("ns"), relay
        finally:
            await connection.close()


async def refused(request: Awaitable[object]) -> None:
    with pytest.raises(AccessRefused, match="hpcfs login"):
        await request


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_other_keys_in_the_file_are_used_at_once(
    status: int, code: str, credentials: Credentials, rclone: S3Server, tmp_path: Path
) -> None:
    async def main() -> None:
        async with as_lab(rclone, tmp_path, status, code) as (_, remote, relay):
            await refused(remote.connect())
            before = len(relay.asked)
            for _ in range(3):
                await refused(remote.stat(b"f"))
            assert len(relay.asked) == before, "the server is not asked in vain"
            credentials.write(credentials.good)
            assert (await remote.stat(b"f")).size == 7
            assert [one.name async for page in remote.list(b"") for one in page] == [b"f"]

    asyncio.run(main())


def test_credentials_that_expire_are_replaced_without_an_error(
    credentials: Credentials, rclone: S3Server, tmp_path: Path
) -> None:
    """As with tools that write new ones to the file every hour."""
    credentials.write(credentials.good)

    async def main() -> None:
        async with as_lab(rclone, tmp_path, 400, "ExpiredToken") as (site, remote, relay):
            await remote.connect()
            credentials.write(EXPIRED)
            assert await site._login.renew()
            credentials.write(credentials.good)
            entries = await asyncio.gather(*(remote.stat(b"f") for _ in range(5)))
            assert {entry.size for entry in entries} == {7}
            assert any("credential=oldkey/" in asked.head for asked in relay.asked)
            assert await site._login.renew() is False, "there are no others now"

    asyncio.run(main())


@pytest.mark.parametrize("output", ["", "not JSON", '{"Version": 7}', '{"Version": 1}'])
def test_a_program_that_gave_nonsense_is_asked_again(
    output: str, credentials: Credentials, rclone: S3Server, tmp_path: Path
) -> None:
    credentials.by_process(output)

    async def main() -> None:
        async with as_lab(rclone, tmp_path) as (_, remote, relay):
            await refused(remote.connect())
            await refused(remote.stat(b"f"))
            assert relay.asked == []
            credentials.by_process(credentials.good_output)
            assert (await remote.stat(b"f")).size == 7

    asyncio.run(main())


def test_an_empty_file_makes_no_site_anonymous(
    credentials: Credentials, rclone: S3Server, tmp_path: Path
) -> None:
    """A tool that writes the file anew may empty it first, in the moment of a look."""
    credentials.write(OLD.replace("[lab]", "[default]"))

    async def main() -> None:
        async with as_lab(rclone, tmp_path, profile=None) as (_, remote, relay):
            await refused(remote.connect())
            credentials.write("")
            await refused(remote.stat(b"f"))
            credentials.file.unlink()
            await refused(remote.stat(b"f"))
            assert all("authorization:" in asked.head for asked in relay.asked)
            credentials.write(credentials.good.replace("[lab]", "[default]"))
            assert (await remote.stat(b"f")).size == 7

    asyncio.run(main())


def test_a_deletion_of_many_outlives_its_credentials(
    credentials: Credentials, rclone: S3Server, tmp_path: Path
) -> None:
    """Those that have expired are replaced, and those that are refused are not offered again."""
    credentials.write(credentials.good)

    async def main() -> None:
        async with as_lab(rclone, tmp_path, 400, "ExpiredToken") as (site, remote, relay):
            bucket = remote._bucket
            await remote.connect()
            credentials.write(EXPIRED)
            assert await site._login.renew()
            credentials.write(credentials.good)
            await bucket.delete_many(["lab/f"])
            assert await bucket.head("lab/f") is None
            credentials.write(EXPIRED)
            assert await site._login.renew()
            await refused(bucket.delete_many(["lab/f"]))
            asked = len(relay.asked)
            await refused(bucket.delete_many(["lab/f"]))
            assert len(relay.asked) == asked

    asyncio.run(main())


def test_an_answer_that_may_mean_something_else_asks_the_providers_rarely(
    credentials: Credentials, rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A HEAD that is refused with 400 does not say why: programs are not run for each."""
    monkeypatch.setattr(refusal, "LOOK_SECONDS", 60.0)
    credentials.write(credentials.good)

    async def main() -> None:
        async with as_lab(rclone, tmp_path) as (site, remote, relay):
            await remote.connect()
            looks: list[object] = []
            others = site._login._others

            async def counted(session: Any) -> Any:
                looks.append(session)
                return await others(session)

            monkeypatch.setattr(site._login, "_others", counted)
            relay.own = lambda asked: refused_with(400, "") if asked.method == "HEAD" else None
            for _ in range(5):
                with pytest.raises(RemoteError):
                    await remote._bucket.head("lab/f")
            assert len(looks) == 1

    asyncio.run(main())


@pytest.mark.parametrize("how", ["hpcfs login", "a minute later"])
def test_the_same_keys_are_tried_again(
    how: str, credentials: Credentials, rclone: S3Server, tmp_path: Path
) -> None:
    """What was wrong may have been mended at the server."""

    async def main() -> None:
        async with as_lab(rclone, tmp_path) as (site, remote, relay):
            credentials.write(credentials.good)
            relay.own = lambda asked: refused_with(403, "InvalidAccessKeyId")
            await refused(remote.connect())
            relay.own = lambda asked: None
            await refused(remote.stat(b"f"))
            if how == "hpcfs login":
                await site.renew()
            else:
                site.health.refusal._backoff.retry_at -= 60
            assert (await remote.stat(b"f")).size == 7

    asyncio.run(main())


@pytest.mark.parametrize("how", ["hpcfs login", "the next connection"])
def test_whoever_had_none_may_get_some(
    how: str,
    credentials: Credentials,
    rclone: S3Server,
    tmp_path: Path,
) -> None:
    """A site that was asked as anybody may is asked with credentials after `hpcfs login`, and by
    itself where the credentials were only not there yet."""
    credentials.write("")

    async def main() -> None:
        async with relay_before(rclone) as relay:
            relay.own = lambda asked: (
                None if "authorization:" in asked.head else refused_with(403, "AccessDenied")
            )
            site = S3Site(relay.server.endpoint_url, rclone.region)
            spec = SiteSpec(site, {"ns": S3Root(rclone.bucket, "lab")}, str(tmp_path), 1000, 1000)
            connection = S3SiteConnection(spec)
            try:
                remote = connection.remote("ns")
                with pytest.raises(AccessRefused, match="not public"):
                    await remote.connect()
                credentials.write(credentials.good.replace("[lab]", "[default]"))
                if how == "hpcfs login":
                    await connection.renew()
                assert (await remote.connect()).remark == ""
                assert (await remote.stat(b"f")).size == 7
            finally:
                await connection.close()

    asyncio.run(main())
