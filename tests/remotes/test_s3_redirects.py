"""Redirects of S3 servers are not followed: neither credentials nor bodies go anywhere else. And
no answer is read without end."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha1
from pathlib import Path

import pytest

from hpcfs.model.errors import ProtocolError, RemoteError, RemoteFailure
from hpcfs.model.sites import S3Site
from hpcfs.remotes.s3.login import S3Login
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.remotes.s3.objects import Info
from hpcfs.remotes.s3.remote import S3Remote
from tests.remotes.test_s3_direct import remote_of, self_signed
from tests.support.s3 import S3Server

FIRST, SECOND = "127.0.0.1", "127.0.0.2"
STATUSES = (301, 302, 303, 307, 308)
WAYS = ("direct", "botocore")


@dataclass
class Listener:
    """An HTTP server that gives one answer to everything, and remembers what it was asked."""

    url: str
    answer: bytes
    asked: list[bytes] = field(default_factory=list)


@asynccontextmanager
async def listening(
    host: str, answer: bytes = b"", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Listener]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                found.asked.append(head)
                if b"100-continue" in head:
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                lengths = [
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length:")
                ]
                await reader.readexactly(sum(lengths))
                writer.write(found.answer)
                await writer.drain()

    async with serving(talk, host, tls) as port:
        found = Listener(f"{'https' if tls else 'http'}://{host}:{port}", answer)
        yield found


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(talk: Talk, host: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A port; at the end no connection to it is left."""
    talks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        try:
            await talk(reader, writer)
        except asyncio.CancelledError:
            pass  # the test has ended
        finally:
            talks.discard(task)
            writer.transport.abort()

    listener = await asyncio.start_server(serve, host, 0, ssl=tls)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        left = list(talks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left)


def redirect(status: int, target: str) -> bytes:
    return (
        f"HTTP/1.1 {status} Go\r\nLocation: {target}/elsewhere?x=y\r\nContent-Length: 0\r\n\r\n"
    ).encode()


async def _listing(remote: S3Remote) -> None:
    async for _ in remote.list(b"d"):
        pass


async def _upload_part(remote: S3Remote) -> None:
    upload = await remote._bucket.create_upload("k", Metadata(), {})
    await remote._bucket.upload_part("k", upload, 1, b"secret body")


async def _copy(remote: S3Remote) -> None:
    await remote._bucket.copy(Info("k", 1, "e", 0), "l")


Work = Callable[[S3Remote], Awaitable[object]]
WORK: dict[str, Work] = {
    "connect": lambda remote: remote.connect(),
    "stat": lambda remote: remote.stat(b"f"),
    "list": _listing,
    "get": lambda remote: remote._bucket.get("k", b"e", 0, 9),
    "put": lambda remote: remote._bucket.put("k", b"secret body", Metadata(), {}),
    "begin": _upload_part,
    "copy": _copy,
    "delete": lambda remote: remote._bucket.delete("k"),
    "delete many": lambda remote: remote._bucket.delete_many(["k", "l"]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", STATUSES)
def test_another_host_sees_no_request(status: int, way: str) -> None:
    async def test() -> None:
        async with AsyncExitStack() as stack:
            second = await stack.enter_async_context(listening(SECOND))
            second.answer = redirect(status, second.url)
            first = await stack.enter_async_context(listening(FIRST, redirect(status, second.url)))
            async with remote_of(S3Server(first.url), "") as remote:
                if way == "botocore":
                    remote._bucket._access.direct._routes[remote._bucket.name] = None
                for work in WORK.values():
                    first.asked.clear()
                    with pytest.raises(RemoteFailure, match=r"redirects to http://127\.0\.0\.2:"):
                        await work(remote)
                    assert first.asked
            assert second.asked == []

    asyncio.run(test())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("status", [302, 307])
def test_https_never_becomes_http(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, way: str
) -> None:
    certificate = self_signed(tmp_path)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, tmp_path / "key.pem")

    async def test() -> None:
        async with AsyncExitStack() as stack:
            plain = await stack.enter_async_context(listening(FIRST, redirect(status, "http://x")))
            answer = redirect(status, plain.url)
            secure = await stack.enter_async_context(listening(FIRST, answer, tls))
            async with remote_of(S3Server(secure.url), "") as remote:
                if way == "botocore":
                    remote._bucket._access.direct._routes[remote._bucket.name] = None
                for work in WORK.values():
                    with pytest.raises(RemoteFailure, match=r"redirects to http://127\.0\.0\.1:"):
                        await work(remote)
            assert secure.asked
            assert plain.asked == []

    asyncio.run(test())


def test_a_region_of_the_same_endpoint_is_followed_and_signed_for() -> None:
    """S3's own redirect: the same host is asked once more, by botocore, in the bucket's region."""
    body = b"<Error><Code>PermanentRedirect</Code><Message>m</Message></Error>"
    own = (
        b"HTTP/1.1 301 Moved\r\nx-amz-bucket-region: eu-far-1\r\n"
        b"Location: http://127.0.0.2:1/\r\nContent-Length: %d\r\n\r\n" % len(body)
    )

    async def test() -> None:
        async with listening(FIRST, own + body) as first:
            async with remote_of(S3Server(first.url), "") as remote:
                with pytest.raises(RemoteError, match="another region"):
                    await remote.connect()
            assert any(b"/eu-far-1/s3/" in head for head in first.asked)

    asyncio.run(test())


# --- where credentials come from ------------------------------------------------------------------

ROLE = "arn:aws:iam::123456789012:role/some"


def _by_container(url: str, home: Path) -> tuple[dict[str, str], str | None]:
    return {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{url}/creds",
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": "a-secret",
    }, None


def _by_instance(url: str, home: Path) -> tuple[dict[str, str], str | None]:
    return {"AWS_EC2_METADATA_SERVICE_ENDPOINT": url}, None


def _by_web_identity(url: str, home: Path) -> tuple[dict[str, str], str | None]:
    token = home / "token"
    token.write_text("a-secret")
    names = {"AWS_ENDPOINT_URL_STS": url, "AWS_ROLE_ARN": ROLE, "AWS_REGION": "us-east-1"}
    return {**names, "AWS_WEB_IDENTITY_TOKEN_FILE": str(token)}, None


def _by_role(url: str, home: Path) -> tuple[dict[str, str], str | None]:
    (home / "config").write_text(
        f"[profile p]\nrole_arn = {ROLE}\nsource_profile = q\nregion = us-east-1\n"
        "[profile q]\naws_access_key_id = KEY\naws_secret_access_key = a-secret\n"
    )
    return {"AWS_ENDPOINT_URL_STS": url, "AWS_CONFIG_FILE": str(home / "config")}, "p"


def _by_single_sign_on(url: str, home: Path) -> tuple[dict[str, str], str | None]:
    start = "https://sign-on.example.org"
    (home / "config").write_text(
        f"[profile p]\nsso_start_url = {start}\nsso_region = us-east-1\n"
        "sso_account_id = 123456789012\nsso_role_name = some\n"
    )
    cached = home / ".aws" / "sso" / "cache"
    cached.mkdir(parents=True)
    later = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    name = sha1(start.encode(), usedforsecurity=False).hexdigest()
    (cached / f"{name}.json").write_text(
        json.dumps({"startUrl": start, "accessToken": "a-secret", "expiresAt": later})
    )
    return {"AWS_ENDPOINT_URL_SSO": url, "AWS_CONFIG_FILE": str(home / "config")}, "p"


Provider = Callable[[str, Path], tuple[dict[str, str], str | None]]
PROVIDERS: dict[str, Provider] = {
    "container": _by_container,
    "instance": _by_instance,
    "web identity": _by_web_identity,
    "role": _by_role,
    "single sign-on": _by_single_sign_on,
}


@pytest.mark.parametrize("status", [302, 307])
@pytest.mark.parametrize("provider", PROVIDERS.values(), ids=PROVIDERS)
def test_providers_of_credentials_follow_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: Provider, status: int
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_EC2_METADATA_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    place = str(tmp_path / ".aws" / "sso" / "cache")  # botocore asks for ~ when it is imported
    monkeypatch.setattr("botocore.credentials.SSOProvider._SSO_TOKEN_CACHE_DIR", place)

    async def test() -> None:
        async with AsyncExitStack() as stack:
            second = await stack.enter_async_context(
                listening(SECOND, redirect(status, "http://x"))
            )
            first = await stack.enter_async_context(listening(FIRST, redirect(status, second.url)))
            environment, profile = provider(first.url, tmp_path)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            login = S3Login(S3Site(profile=profile))
            with suppress(Exception):  # each provider has its own, and one none
                assert await login.keys() is None
            await login.close()
            assert first.asked
            assert second.asked == []

    asyncio.run(test())


# --- answers without end --------------------------------------------------------------------------

LIMIT = 1024 * 1024
BUFFERED = 8 * 1024 * 1024
"""What the system holds of a connection over loopback, at most."""


@asynccontextmanager
async def endless(head: bytes, piece: bytes) -> AsyncIterator[tuple[str, list[int]]]:
    """A server whose answers never end, and how many bytes of each went out."""
    counts: list[int] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            number = len(counts)
            counts.append(0)
            writer.write(head)
            while counts[number] < 20 * BUFFERED:
                writer.write(piece)
                counts[number] += len(piece)
                await writer.drain()

    async with serving(talk, FIRST) as port:
        yield f"http://{FIRST}:{port}", counts


LONG = {
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"10000\r\n" + b"<" * 65536 + b"\r\n",
    ),
    "counted": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"<" * 65536),
    "a refusal": (b"HTTP/1.1 403 No\r\nContent-Length: 99999999999\r\n\r\n", b"<" * 65536),
    "until the end": (b"HTTP/1.1 200 OK\r\n\r\n", b"<" * 65536),
}


@pytest.mark.parametrize(("head", "piece"), LONG.values(), ids=LONG)
def test_an_answer_without_end_is_given_up(
    head: bytes, piece: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcfs.remotes.s3.botocore_guard.ANSWER_BYTES", LIMIT)

    async def test() -> None:
        async with endless(head, piece) as (url, counts):
            async with remote_of(S3Server(url), "") as remote:
                with pytest.raises(ProtocolError, match="too long"):
                    await remote._bucket.call("list_parts", "k", Key="k", UploadId="u")
            assert counts
            assert max(counts) <= LIMIT + BUFFERED

    asyncio.run(test())
