"""The direct way to S3: it says what botocore says, survives servers that misbehave, and lets
those pass who are waited for."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import ipaddress
import os
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import ReadOnlyCredentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings, strategies as st

from hpcfs.model.errors import Changed, ProtocolError, Unreachable
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.remotes.s3.direct import STRANGE_IN_A_ROW
from hpcfs.remotes.s3.http import (
    PIECE_BYTES,
    ConnectionLost,
    HttpRequest,
    HttpResponse,
    UnusualResponse,
)
from hpcfs.remotes.s3.login import S3Login
from hpcfs.remotes.s3.metadata import Metadata
from hpcfs.remotes.s3.parts import MIB
from hpcfs.remotes.s3.pool import HostAddress, Pool, PoolLimits
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.request_gate import Bounds, RequestGate
from hpcfs.remotes.s3.signing import UNSIGNED, Keys, Signer
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.support.s3 import S3Server, rclone_s3

LOOPBACK = "127.0.0.1"


@asynccontextmanager
async def remote_of(
    server: S3Server, prefix: str, bounds: Bounds | None = None, cache: str = "/nonexistent"
) -> AsyncIterator[S3Remote]:
    site = S3Site(
        endpoint_url=server.endpoint_url,
        region=server.region,
        access_key=Secret(server.access_key),
        secret_key=Secret(server.secret_key),
        connect_timeout=2,
    )
    spec = SiteSpec(site, {"data": S3Root(server.bucket, prefix)}, cache, 1000, 1000)
    connection = S3SiteConnection(spec, bounds=bounds)
    try:
        yield connection.remote("data")
    finally:
        await connection.close()


def put(server: S3Server, key: str, data: bytes = b"", **extra: Any) -> None:
    with server.client() as client:
        client.put_object(Bucket=server.bucket, Key=key, Body=data, **extra)


def count(remote: S3Remote) -> list[str]:
    """The operations that botocore's client is asked for from now on."""
    asked: list[str] = []
    real = remote._bucket._by_client

    async def counted(operation: str, parameters: dict[str, Any]) -> dict[str, Any]:
        asked.append(operation)
        return await real(operation, parameters)

    remote._bucket._by_client = counted  # type: ignore[method-assign]
    return asked


# --- what botocore says ---------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(
    method=st.sampled_from(["GET", "HEAD", "PUT"]),
    body=st.binary(max_size=20),
    key=texts,
    query=st.dictionaries(st.sampled_from(["prefix", "delimiter", "list-type", "max-keys"]), texts),
    headers=st.dictionaries(
        st.sampled_from(["range", "if-match"]), st.text("ab =-0", min_size=1).map(str.strip)
    ),
    token=st.none() | st.just("a/token=="),
    tls=st.booleans(),
)
@settings(deadline=None)
def test_a_signature_is_botocores(
    method: str, key: str, query: dict[str, str], headers: dict[str, str], token: str | None,
    tls: bool, body: bytes,
) -> None:  # fmt: skip
    path = "/bucket/" + quote(key, safe="/~")
    parts = "&".join(f"{name}={quote(query[name], safe='-_.~')}" for name in sorted(query))
    scheme = "https" if tls else "http"
    if method == "PUT":
        headers = {**headers, "content-md5": "as+it/is=="}
    theirs = AWSRequest(method, f"{scheme}://host.example:81{path}?{parts}", headers=headers)
    theirs.data = body if method == "PUT" else b""
    theirs.context["has_streaming_input"] = bool(theirs.data)  # as put_object and upload_part have
    S3SigV4Auth(ReadOnlyCredentials("KEY", "secret", token), "s3", "eu-x").add_auth(theirs)
    time = datetime.datetime.strptime(theirs.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ")
    signer = Signer("eu-x", "s3")
    ours = signer.sign(
        method, path, parts, {**headers, "host": "host.example:81"}, Keys("KEY", "secret", token),
        time, UNSIGNED if tls and theirs.data else hashlib.sha256(theirs.data).hexdigest(),
    )  # fmt: skip
    expected = {name.lower(): value for name, value in theirs.headers.items()}
    assert ours == {**expected, "host": "host.example:81"}


ODD_KEYS = ("plain", "ünï cödé+%41", "q?&=#;", "tilde~'\"", "d/e/f")


def test_both_ways_say_the_same(server: S3Server, prefix: str) -> None:
    extra = {
        "Metadata": {"mode": "33188", "team": "ice"},
        "ContentType": "text/x-model",
        "CacheControl": "no-cache",
        "ContentLanguage": "de",
        "Expires": datetime.datetime(2030, 1, 2, tzinfo=datetime.UTC),
    }
    keys = [f"{prefix}/{key}" for key in ODD_KEYS]
    for key in keys:
        put(server, key, key.encode() * 10, **extra)

    async def look(remote: S3Remote) -> list[Any]:
        bucket = remote._bucket
        found: list[Any] = [await bucket.first(f"{prefix}/", 100, delimiter="/")]
        found.append(await bucket.first(f"{prefix}/", 1))
        found += [page async for page in bucket.pages(f"{prefix}/")]
        for key in keys:
            info = await bucket.head(key)
            assert info is not None
            found += [replace(info, server_time_ns=None)]
            found += [bytes(await bucket.get(key, info.version, 3, 7))]
        found.append(await bucket.head(f"{prefix}/missing"))
        with pytest.raises(Changed) as changed:
            await bucket.get(f"{prefix}/missing", b"v", 0, 1)
        return [*found, str(changed.value)]

    async def test() -> None:
        async with remote_of(server, prefix) as remote:
            asked = count(remote)
            direct = await look(remote)
            assert asked == []
            remote._bucket._access.direct._routes[server.bucket] = None
            assert await look(remote) == direct
            assert len(asked) > len(keys)

    asyncio.run(test())


def test_both_ways_write_the_same(server: S3Server, prefix: str) -> None:
    headers = {"ContentType": "text/x-model", "CacheControl": "no-cache", "ContentLanguage": "de"}
    metadata = Metadata(mode=33188, mtime_ns=5 * 10**9, foreign=(("team", "ice"),))
    odd = Metadata(foreign=(("team", "Bär"),))
    bodies = (b"", b"small", os.urandom(3 * MIB))

    async def write(remote: S3Remote, base: str) -> list[Any]:
        bucket = remote._bucket
        found: list[Any] = []
        for number, body in enumerate(bodies):
            for key in ODD_KEYS:
                name = f"{base}/{number}{key}"
                found.append(await bucket.put(name, body, metadata, headers))
                info = await bucket.head(name)
                assert info is not None
                found.append((info.etag, info.size, info.metadata, info.headers))
                found.append(await bucket.copy(info, f"{base}/{number}copy/{key}"))
                found.append(await bucket.copy(info, name, odd, headers))
                copied = await bucket.head(f"{base}/{number}copy/{key}")
                assert copied is not None
                found.append((copied.etag, copied.metadata, copied.headers))
        upload = await bucket.create_upload(f"{base}/parts", metadata, headers)
        found.append(await bucket.upload_part(f"{base}/parts", upload, 1, bodies[2]))
        await bucket.abort_upload(f"{base}/parts", upload)
        return found

    async def test() -> None:
        async with remote_of(server, prefix) as remote:
            asked = count(remote)
            direct = await write(remote, f"{prefix}/one")
            assert asked == ["create_multipart_upload", "abort_multipart_upload"]
            remote._bucket._access.direct._routes[server.bucket] = None
            assert await write(remote, f"{prefix}/two") == direct

    asyncio.run(test())


def test_credentials_that_expire_are_renewed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the provider that botocore knows; here a program that gives others each time."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    program = tmp_path / "give.py"
    program.write_text(
        "import datetime, json, pathlib, sys\n"
        "file = pathlib.Path(sys.argv[1]); n = int(file.read_text()) + 1; file.write_text(str(n))\n"
        "end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=5)\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'KEY{n}', 'SecretAccessKey': 's',"
        " 'SessionToken': 't', 'Expiration': end.isoformat()}))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[profile p]\ncredential_process = {sys.executable} {program} {counter}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))

    async def test() -> None:
        login = S3Login(S3Site(profile="p"))
        first, second = await login.keys(), await login.keys()
        assert (first.token, second.token) == ("t", "t")
        assert int(second.access_key[3:]) > int(first.access_key[3:])
        assert "KEY" not in repr(first)
        await login.close()

    asyncio.run(test())


def test_a_proxy_is_not_gone_around(
    moto: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(moto, f"{prefix}/f", b"data")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")

    async def connect() -> None:
        async with remote_of(moto, prefix) as remote:
            await remote.connect()

    with pytest.raises(Unreachable):
        asyncio.run(connect())
    monkeypatch.setenv("no_proxy", LOOPBACK)
    asyncio.run(connect())


def test_tls_trusts_whom_botocore_trusts(
    tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    options = ("--cert", str(certificate), "--key", str(tmp_path / "key.pem"))
    with rclone_s3(tmp_path / "buckets", *options) as plain:
        server = replace(plain, endpoint_url=plain.endpoint_url.replace("http:", "https:"))

        async def read() -> list[str]:
            async with remote_of(server, "") as remote:
                asked = count(remote)
                await remote.connect()
                entry = await remote.stat(b"f")
                pieces = await remote.fetch(b"f", entry.version, 0, entry.size, 1)
                assert b"".join(pieces) == b"over TLS"
                body = os.urandom(5 * MIB)
                etag = await remote._bucket.put("g", body, Metadata(), {})
                assert bytes(await remote._bucket.get("g", etag.encode(), 0, len(body))) == body
                return asked

        (tmp_path / "buckets" / server.bucket / "f").write_bytes(b"over TLS")
        with pytest.raises(Unreachable, match="certificate"):
            asyncio.run(read())
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        assert asyncio.run(read()) == []


def self_signed(directory: Path) -> Path:
    """A certificate for the loopback address; its key is beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address(LOOPBACK))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / "key.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    path = directory / "certificate.pem"
    path.write_bytes(certificate.public_bytes(pem))
    return path


# --- servers that misbehave -----------------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\n"


@asynccontextmanager
async def pool_to(serve: Serve, connections: int = 96) -> AsyncIterator[Pool]:
    serving = set[asyncio.Task[None]]()
    """Held, since the loop forgets a task that waits for nothing but itself."""

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        serving.add(task)
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return  # the client is done with this connection, or the test with the server
        finally:
            writer.close()

    listener = await asyncio.start_server(one, LOOPBACK, 0)
    port = listener.sockets[0].getsockname()[1]
    pool = Pool(HostAddress(LOOPBACK, port, None), PoolLimits(5, connections), lambda seconds: None)
    try:
        yield pool
    finally:
        pool.close()
        listener.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving)


def always(answer: bytes, *, pieces: int = 1 << 20, then_close: bool = False) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            for start in range(0, len(answer), pieces):
                writer.write(answer[start : start + pieces])
                await writer.drain()
                await asyncio.sleep(0)
            if then_close:
                return

    return serve


ASK = HttpRequest(b"GET / HTTP/1.1\r\n\r\n", limit=1000)


async def ask(serve: Serve, question: HttpRequest = ASK) -> HttpResponse:
    async with pool_to(serve) as pool:
        return await pool.ask(question)


MALFORMED = {
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "no length": OK + b"a: b\r\n\r\nabc",
    "a length that is none": OK + b"content-length: -3\r\n\r\nabc",
    "two lengths": OK + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc",
    "no header": OK + b"nonsense\r\n\r\n",
    "a folded header": OK + b"a: b\r\n c: d\r\ncontent-length: 0\r\n\r\n",
    "bytes that are no text": OK + b"a: \xff\r\ncontent-length: 0\r\n\r\n",
    "endless headers": OK + b"a: " + b"b" * 100_000,
    "an encoding": OK + b"transfer-encoding: gzip\r\n\r\nabc",
    "a chunk without size": OK + b"transfer-encoding: chunked\r\n\r\nx\r\n",
    "a chunk that is longer": OK + b"transfer-encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n",
    "endless chunks": OK + b"transfer-encoding: chunked\r\n\r\n" + b"9\r\n123456789\r\n" * 9000,
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_answer_is_refused(answer: bytes) -> None:
    with pytest.raises(UnusualResponse):
        asyncio.run(ask(always(answer)))


@pytest.mark.parametrize("answer", [b"", OK, OK + b"content-length: 9\r\n\r\nabc"])
def test_an_answer_that_breaks_off(answer: bytes) -> None:
    with pytest.raises(ConnectionLost):
        asyncio.run(ask(always(answer, then_close=True)))


@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_chunks_and_interim_answers_are_understood(pieces: int) -> None:
    answer = (
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Transfer-Encoding: chunked\r\n\r\n"
        b"3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\ntrailer: x\r\n\r\n"
    )
    found = asyncio.run(ask(always(answer, pieces=pieces)))
    assert found.body == b"abc0123456789"


def test_a_body_that_is_too_long_is_not_read() -> None:
    answer = OK + b"content-length: 1001\r\nx: y\r\n\r\n" + b"a" * 1001

    async def test() -> None:
        async with pool_to(always(answer)) as pool:
            found = await pool.ask(ASK)
            assert (found.body, found.headers["x"], found.status) == (None, "y", 200)
            assert pool._idle == []

    asyncio.run(test())


def test_answers_to_head_have_no_body() -> None:
    """What a server sends all the same is not taken for the next answer."""
    answer = OK + b"content-length: 3\r\n\r\nabc"

    async def test() -> None:
        async with pool_to(always(answer)) as pool:
            for _ in range(3):
                found = await pool.ask(HttpRequest(b"HEAD / HTTP/1.1\r\n\r\n", bodiless=True))
                assert (found.body, found.status) == (b"", 200)

    asyncio.run(test())


def test_a_connection_that_went_away_while_idle_is_replaced() -> None:
    answer = OK + b"content-length: 3\r\n\r\nabc"

    async def test() -> None:
        async with pool_to(always(answer, then_close=True)) as pool:
            for _ in range(20):
                assert (await pool.ask(ASK)).body == b"abc"

    asyncio.run(test())


def test_a_server_that_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcfs.remotes.s3.pool.TICK_SECONDS", 0.01)

    async def test() -> None:
        async with pool_to(always(OK)) as pool:
            with pytest.raises(TimeoutError):
                await pool.ask(replace(ASK, silence=0.05))

    asyncio.run(test())


def test_whoever_is_cancelled_gives_up_the_connection_at_once() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"content-length: 900\r\n\r\nabc")
        begun.set()
        await reader.read()  # until the connection ends
        gone.set()

    begun = asyncio.Event()

    async def test() -> None:
        async with pool_to(serve) as pool:
            task = asyncio.create_task(pool.ask(ASK))
            await begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await gone.wait()
            assert (pool._idle, pool._all) == ([], set())

    asyncio.run(test())


def test_a_server_that_fails_is_asked_again(moto: S3Server, prefix: str) -> None:
    put(moto, f"{prefix}/f", b"data")
    busy = b"HTTP/1.1 502 Bad Gateway\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"

    async def test() -> None:
        async with relay_to(moto) as (front, answers), remote_of(front, prefix) as remote:
            asked = count(remote)
            await remote.connect()
            entry = await remote.stat(b"f")
            answers.extend([busy] * 2)
            pieces = await remote.fetch(b"f", entry.version, 0, 4, 1)
            assert b"".join(pieces) == b"data"
            assert (asked, answers) == ([], [])
            answers.extend([busy] * 3)
            with pytest.raises(Unreachable):
                await remote.fetch(b"f", entry.version, 0, 4, 1)
            assert answers == []

    asyncio.run(test())


def test_more_than_was_asked_for_is_refused(moto: S3Server, prefix: str) -> None:
    put(moto, f"{prefix}/f", b"data")
    whole = OK + b'etag: "x"\r\ncontent-length: 400\r\n\r\n' + b"a" * 400

    async def test() -> None:
        async with relay_to(moto) as (front, answers), remote_of(front, prefix) as remote:
            await remote.connect()
            answers.append(whole)
            with pytest.raises(ProtocolError, match="other bytes"):
                await remote.fetch(b"f", b"x", 0, 4, 1)

    asyncio.run(test())


@asynccontextmanager
async def relay_to(server: S3Server) -> AsyncIterator[tuple[S3Server, list[bytes]]]:
    """A relay, one request per connection; it gives the answers in the list itself, while there
    are any."""
    own: list[bytes] = []
    port = int(server.endpoint_url.rpartition(":")[2])

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if own:
            writer.write(own.pop())
        else:
            back, forth = await asyncio.open_connection(LOOPBACK, port)
            forth.write(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            writer.write(await back.read())
            forth.close()
        await writer.drain()
        writer.close()

    listener = await asyncio.start_server(serve, LOOPBACK, 0)
    front = listener.sockets[0].getsockname()[1]
    try:
        yield replace(server, endpoint_url=f"http://{LOOPBACK}:{front}"), own
    finally:
        listener.close()


# --- turns ----------------------------------------------------------------------------------------


class Turns:
    """Requests that wait at a gate; each ends when told to."""

    def __init__(self, gate: RequestGate) -> None:
        self.gate = gate
        self.under_way: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, size: int = 0, *, urgent: bool = False) -> None:
        async def request() -> None:
            async with self.gate.turn(size, urgent=urgent):
                self.under_way[name] = asyncio.Event()
                await self.under_way[name].wait()

        self.tasks[name] = asyncio.create_task(request())
        await self.settled()

    async def settled(self) -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def end(self, name: str) -> None:
        self.under_way.pop(name).set()
        await self.tasks.pop(name)
        await self.settled()

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait([self.tasks.pop(name)])
        self.under_way.pop(name, None)
        await self.settled()


def test_what_is_waited_for_overtakes() -> None:
    async def test() -> None:
        turns = Turns(RequestGate(Bounds(fewest_slots=2, slots=2, urgent_slots=1)))
        for name in ("a", "b", "c", "d"):
            await turns.ask(name)
        assert set(turns.under_way) == {"a", "b"}
        await turns.ask("urgent", urgent=True)
        await turns.ask("more urgent", urgent=True)
        assert set(turns.under_way) == {"a", "b", "urgent"}
        await turns.end("a")
        assert set(turns.under_way) == {"b", "urgent", "more urgent"}
        await turns.end("b")
        await turns.end("urgent")
        assert set(turns.under_way) == {"more urgent", "c"}
        for name in ("more urgent", "c", "d"):
            await turns.end(name)

    asyncio.run(test())


def test_bulk_is_bounded_by_its_bytes_and_leaves_room() -> None:
    async def test() -> None:
        turns = Turns(RequestGate(Bounds(fewest_slots=4, slots=4, bulk_bytes=16 * MIB)))
        await turns.ask("huge", 40 * MIB)
        await turns.ask("large", 8 * MIB)
        await turns.ask("small")
        assert set(turns.under_way) == {"huge", "small"}
        await turns.end("huge")
        await turns.ask("second", 8 * MIB)
        await turns.ask("third", 8 * MIB)
        assert set(turns.under_way) == {"large", "second", "small"}
        await turns.cancel("second")
        assert set(turns.under_way) == {"large", "third", "small"}
        for name in ("large", "third", "small"):
            await turns.end(name)

    asyncio.run(test())


def test_whoever_stops_waiting_holds_up_nobody() -> None:
    async def test() -> None:
        turns = Turns(RequestGate(Bounds(fewest_slots=2, slots=2, bulk_bytes=8 * MIB)))
        await turns.ask("bulk", 8 * MIB)
        await turns.ask("first", 8 * MIB)
        await turns.ask("second", 8 * MIB)
        await turns.cancel("first")
        assert set(turns.under_way) == {"bulk"}
        turns.tasks["bulk"].cancel()
        turns.tasks["second"].cancel()
        await asyncio.wait(turns.tasks.values())
        await turns.ask("next", 8 * MIB)
        await turns.ask("small")
        assert {"next", "small"} <= set(turns.under_way)
        for name in ("next", "small"):
            await turns.end(name)

    asyncio.run(test())


def test_distance_gives_more_slots_up_to_the_bound() -> None:
    gate = RequestGate(Bounds(fewest_slots=32, slots=96, per_second=5000))
    gate.answered_in(0.001)
    assert gate.slots == 32
    for _ in range(500):
        gate.answered_in(0.015)
    assert gate.slots == 75
    for _ in range(500):
        gate.answered_in(0.1)
    assert gate.slots == 96
    gate.answered_in(0.002)
    assert gate.slots == 32


def test_a_walk_keeps_the_attributes_and_the_order(server: S3Server, prefix: str) -> None:
    """More entries than slots, several directories at once, through few slots."""
    for number in range(60):
        put(
            server, f"{prefix}/d{number % 3}/{number:02}", b"x" * number, Metadata={"mode": "33188"}
        )

    async def listed(remote: S3Remote, path: bytes) -> list[tuple[bytes, int, int]]:
        return [
            (entry.name, entry.size, stat.S_IMODE(entry.mode))
            async for page in remote.list(path)
            for entry in page
        ]

    async def test() -> None:
        async with remote_of(server, prefix, Bounds(fewest_slots=4, slots=4)) as remote:
            top = await listed(remote, b"")
            assert [name for name, _, _ in top] == [b"d0", b"d1", b"d2"]
            found = await asyncio.gather(*(listed(remote, name) for name, _, _ in top))
            expected = [
                [(b"%02d" % number, number, 0o644) for number in range(first, 60, 3)]
                for first in range(3)
            ]
            assert found == expected

    asyncio.run(test())


def test_a_look_at_a_directory_is_one_round_trip(moto: S3Server, prefix: str) -> None:
    """The listing says whether there is a marker to be read."""
    put(moto, f"{prefix}/bare/f", b"x")
    put(moto, f"{prefix}/marked/", Metadata={"mode": str(0o040700)})
    put(moto, f"{prefix}/marked/f", b"x")

    async def test() -> None:
        async with remote_of(moto, prefix) as remote:
            await remote.connect()
            await remote.stat(b"bare/f")
            heads: list[str] = []
            real = remote._bucket.head

            async def head(key: str, *, urgent: bool = True) -> Any:
                heads.append(key)
                return await real(key, urgent=urgent)

            remote._bucket.head = head  # type: ignore[method-assign]
            assert (await remote.stat(b"bare")).mode == 0o040755
            assert f"{prefix}/bare/" not in heads
            assert (await remote.stat(b"marked")).mode == 0o040700

    asyncio.run(test())


def test_a_server_that_is_never_understood_is_left_to_botocore(
    moto: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(moto, f"{prefix}/f", b"x")
    tried: list[object] = []

    def strange(headers: object) -> dict[str, Any]:
        tried.append(headers)
        raise ValueError("not understood")

    monkeypatch.setattr("hpcfs.remotes.s3.direct.parse_object", strange)

    async def test() -> None:
        async with remote_of(moto, prefix) as remote:
            asked = count(remote)
            for _ in range(STRANGE_IN_A_ROW + 5):
                assert await remote._bucket.head(f"{prefix}/f") is not None
            assert len(asked) == STRANGE_IN_A_ROW + 5
            assert len(tried) == STRANGE_IN_A_ROW

    asyncio.run(test())


# --- bodies that are sent -------------------------------------------------------------------------


def asking(body: bytes, sent: Callable[[], None] | None = None) -> HttpRequest:
    head = f"PUT / HTTP/1.1\r\ncontent-length: {len(body)}\r\n\r\n"
    return HttpRequest(head.encode(), limit=1000, body=body, sent=sent)


@pytest.mark.parametrize("size", [1, 5000, PIECE_BYTES, 9 * MIB + 1])
def test_a_body_arrives_whole(size: int) -> None:
    body = os.urandom(size)
    pieces = 0

    def sent() -> None:
        nonlocal pieces
        pieces += 1

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await reader.readuntil(b"\r\n\r\n")
            digest = hashlib.sha256(await reader.readexactly(size)).hexdigest()
            writer.write(OK + f"content-length: 64\r\n\r\n{digest}".encode())

    async def test() -> None:
        async with pool_to(serve) as pool:
            for _ in range(2):
                answer = await pool.ask(asking(body, sent))
                assert answer.body == hashlib.sha256(body).hexdigest().encode()
            assert len(pool._all) == 1, "the connection can be used again"

    asyncio.run(test())
    if size >= PIECE_BYTES:
        assert pieces == 2 * -(-size // PIECE_BYTES)


def test_a_refusal_that_comes_before_the_body_was_sent_is_heard() -> None:
    """And the connection, on which the rest of the body is still expected, is not used again."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno")
        await writer.drain()
        await asyncio.Event().wait()

    async def test() -> None:
        async with pool_to(serve) as pool:
            for _ in range(2):
                answer = await pool.ask(asking(bytes(64 * MIB)))
                assert (answer.status, answer.body) == (403, b"no")
                assert pool._idle == []

    asyncio.run(test())


def test_a_server_that_takes_no_more_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcfs.remotes.s3.pool.TICK_SECONDS", 0.05)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        async with pool_to(serve) as pool:
            with pytest.raises(TimeoutError):
                await pool.ask(replace(asking(bytes(64 * MIB)), silence=0.3))

    asyncio.run(test())
