"""An upload to S3 that may have reached the server is not one that had no connection."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import aiohttp
import pytest
from botocore.exceptions import EndpointConnectionError, ProxyConnectionError

from hpcfs.model.errors import NotConnected, RemoteError, Unreachable
from hpcfs.remotes.s3.http import ConnectionLost, HttpRequest
from hpcfs.remotes.s3.pool import HostAddress, NotOpened, Pool, PoolLimits
from hpcfs.remotes.s3.sent_writes import note_client_attempt, note_sent, tracing_writes
from hpcfs.remotes.s3.translate import translate

REFUSED = ConnectionRefusedError(111, "Connection refused")
RESET = aiohttp.ClientConnectionResetError("Cannot write to closing transport")


def wrapped(error: Exception) -> EndpointConnectionError:
    """As botocore raises it for whatever aiohttp says of a connection."""
    return EndpointConnectionError(endpoint_url="http://127.0.0.1:1", error=error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (REFUSED, NotConnected),
        (wrapped(REFUSED), NotConnected),
        (wrapped(socket.gaierror(-2, "Name or service not known")), NotConnected),
        (RESET, Unreachable),
        (wrapped(RESET), Unreachable),
        (ConnectionResetError(104, "Connection reset by peer"), Unreachable),
    ],
)
def test_a_connection_that_broke_is_not_one_that_was_never_there(
    error: Exception, kind: type[RemoteError]
) -> None:
    assert type(translate(error, "f")) is kind


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("put_object", Unreachable),
        ("copy_object", Unreachable),
        ("complete_multipart_upload", Unreachable),
        ("delete_object", Unreachable),
        ("delete_objects", Unreachable),
        ("upload_part", NotConnected),  # shows nothing before the upload is complete
        ("head_object", NotConnected),
    ],
)
def test_the_last_error_of_an_upload_tells_what_may_have_been_sent(
    operation: str, kind: type[RemoteError]
) -> None:
    def upload() -> None:
        with tracing_writes():
            note_sent(operation)
            raise NotConnected("the S3 endpoint can't be reached")

    with pytest.raises(Unreachable) as caught:
        upload()
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (None, Unreachable),  # answered, and what followed failed
        (wrapped(RESET), Unreachable),
        (wrapped(REFUSED), NotConnected),
        (ProxyConnectionError(proxy_url="http://proxy", error=ValueError("407")), NotConnected),
    ],
)
def test_an_attempt_of_botocore_tells_whether_it_was_sent(
    error: Exception | None, kind: type[RemoteError]
) -> None:
    def upload() -> None:
        with tracing_writes():
            note_client_attempt(SimpleNamespace(name="PutObject"), error)
            raise NotConnected("the S3 endpoint can't be reached")

    with pytest.raises(Unreachable) as caught:
        upload()
    assert type(caught.value) is kind


def test_each_attempt_of_botocore_counts() -> None:
    put = SimpleNamespace(name="PutObject")

    def upload() -> None:
        with tracing_writes():
            note_client_attempt(operation=put, caught_exception=wrapped(RESET), attempts=1)
            note_client_attempt(operation=put, caught_exception=wrapped(REFUSED), attempts=2)
            raise NotConnected("refused")

    with pytest.raises(Unreachable) as caught:
        upload()
    assert type(caught.value) is Unreachable


def test_uploads_side_by_side_are_told_apart() -> None:
    async def upload(operation: str) -> type[BaseException]:
        try:
            with tracing_writes():
                await asyncio.sleep(0)
                async with asyncio.TaskGroup() as tasks:  # its own tasks are part of it
                    tasks.create_task(asyncio.to_thread(note_sent, operation))
                raise NotConnected("refused")
        except Unreachable as error:
            return type(error)

    async def both() -> list[type[BaseException]]:
        return await asyncio.gather(upload("put_object"), upload("head_object"))

    assert asyncio.run(both()) == [Unreachable, NotConnected]


REQUEST = HttpRequest(b"PUT /b/k HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n", False, 1000)


class OneServer:
    """Answers one request, reads another one, and is gone without a word."""

    async def start(self) -> Pool:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return Pool(HostAddress("127.0.0.1", port, None), PoolLimits(5), lambda seconds: None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        self._server.close()
        writer.close()


def test_a_request_that_an_old_connection_took_was_sent() -> None:
    """Though no new connection can be made for it: the server may have done it."""

    async def story() -> None:
        pool = await OneServer().start()
        assert (await pool.ask(REQUEST)).status == 200
        with pytest.raises(ConnectionLost):
            await pool.ask(REQUEST)
        pool.close()

    asyncio.run(story())


@pytest.mark.parametrize(
    "error",
    [REFUSED, OSError("Multiple exceptions: [Errno 101], [Errno 111]"), OSError(113, "No route")],
)
def test_what_no_connection_took_was_not_sent(
    error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> socket.socket:
        raise error

    async def story() -> None:
        pool = Pool(HostAddress("127.0.0.1", 1, None), PoolLimits(5), lambda seconds: None)
        with pytest.raises(NotOpened):
            await pool.ask(REQUEST)

    monkeypatch.setattr("aiohappyeyeballs.start_connection", fail)
    asyncio.run(story())
