"""An upload to S3 that may have reached the server is not one that had no connection."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace

import aiohttp
import pytest
from botocore.exceptions import EndpointConnectionError

from hpcfs.model.errors import NotConnected, RemoteError, Unreachable
from hpcfs.remotes.s3.sent_writes import note_attempt, note_client_attempt, tracing_writes
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
    ("operation", "error", "kind"),
    [
        ("put_object", None, Unreachable),  # done, and what followed failed
        ("put_object", RESET, Unreachable),
        ("put_object", REFUSED, NotConnected),
        ("complete_multipart_upload", RESET, Unreachable),
        ("upload_part", None, NotConnected),  # shows nothing before the upload is complete
        ("head_object", None, NotConnected),
    ],
)
def test_the_last_error_of_an_upload_tells_what_may_have_been_sent(
    operation: str, error: Exception | None, kind: type[RemoteError]
) -> None:
    def upload() -> None:
        with tracing_writes():
            note_attempt(operation, error)
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
                    tasks.create_task(asyncio.to_thread(note_attempt, operation, None))
                raise NotConnected("refused")
        except Unreachable as error:
            return type(error)

    async def both() -> list[type[BaseException]]:
        return await asyncio.gather(upload("put_object"), upload("head_object"))

    assert asyncio.run(both()) == [Unreachable, NotConnected]
