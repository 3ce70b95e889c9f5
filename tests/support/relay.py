"""A relay in front of an S3 server: it counts what is asked, and answers some of it itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from tests.support.s3 import S3Server

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Asked:
    """A request: `head` in lower case, `target` its path and query as they came."""

    method: str
    target: str
    head: str
    body: bytes


@dataclass
class Relay:
    """`own` gives the answer to a request, or None where the server behind is to be asked."""

    server: S3Server
    own: Callable[[Asked], bytes | None] = lambda asked: None
    asked: list[Asked] = field(default_factory=list)
    rewrite: Callable[[str], str] = lambda text: text
    """Of what goes on to the server: the head."""
    spoil: Callable[[Asked, bytes], bytes] = lambda asked, answer: answer
    """Of what comes back from the server: head and body."""

    def count(self, *words: str) -> int:
        """The requests in whose first line all of these are."""
        return sum(
            all(word in f"{asked.method} {asked.target}" for word in words) for asked in self.asked
        )


def refusal(status: int, code: str, *headers: str) -> bytes:
    """An error as S3 words it."""
    body = f"<Error><Code>{code}</Code><Message>said so</Message></Error>" if code else ""
    lines = [f"HTTP/1.1 {status} No", *headers, f"Content-Length: {len(body)}", "", body]
    return "\r\n".join(lines).encode()


@asynccontextmanager
async def relay_before(server: S3Server) -> AsyncIterator[Relay]:
    """One request per connection."""
    port = int(server.endpoint_url.rpartition(":")[2])
    talks: set[asyncio.Task[None]] = set()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked, head = await _request(reader, writer)
        relay.asked.append(asked)
        answer = relay.own(asked)
        if answer is not None and asked.method == "HEAD":
            answer = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        if answer is None:
            back, forth = await asyncio.open_connection(LOOPBACK, port)
            forth.write(relay.rewrite(head.decode()).encode() + asked.body)
            answer = relay.spoil(asked, await back.read())
            forth.close()
        writer.write(answer.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await talk(reader, writer)
        talks.discard(task)
        writer.close()

    listener = await asyncio.start_server(serve, LOOPBACK, 0)
    front = listener.sockets[0].getsockname()[1]
    relay = Relay(replace(server, endpoint_url=f"http://{LOOPBACK}:{front}"))
    try:
        yield relay
    finally:
        listener.close()
        left = list(talks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left)


async def _request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> tuple[Asked, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode().split("\r\n")[:-2]
    kept = [line for line in lines if not line.lower().startswith(("expect:", "connection:"))]
    if len(kept) < len(lines) and "100-continue" in head.decode().lower():
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    length = sum(
        int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length:")
    )
    body = await reader.readexactly(length)
    method, target, _ = lines[0].split(" ")
    forwarded = "\r\n".join([*kept, "Connection: close", "", ""]).encode()
    return Asked(method, target, head.decode().lower(), body), forwarded
