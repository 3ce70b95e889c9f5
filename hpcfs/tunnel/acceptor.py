"""The laptop's end of every stream: which pipe carries which, and how long one waits for the next.

Others can reach the port of a tunnel on a login node. Who comes is a stranger until the client of
its stream has proved itself: strangers have little time, may say little, and where there are many
the one who has been here longest goes, so that those who let their connections wait keep nobody
out.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hpcfs.rendezvous.stream import GREETING, ID_BYTES, NEW_STREAM, OPENING, Garbled, Pipe, Stream

log = logging.getLogger(__name__)

Kind = Literal["unix", "tcp"]
"""Which kind of place a pipe came through: what is to be proved over it differs."""

WAIT_SECONDS = 120.0
"""How long a stream on which nothing is heard is kept; after half of it the mount is asked to say
something, for its machine may be gone without a word. A mount gives up much earlier
(remotes/tunnel/line.py); a laptop that wakes up should find the stream that the mount still has."""
STRANGER_SECONDS = 10.0
MAX_STRANGERS = 100
"""The mounts of a job on many nodes come all at once."""
MAX_STRANGER_BYTES = 64 * 1024
"""An SSH handshake takes a tenth of it."""


class Incoming:
    """A pipe at our end: feed `received` what comes on it, call `lost` when it broke."""

    def __init__(self, acceptor: Acceptor, pipe: Pipe, kind: Kind) -> None:
        self._acceptor = acceptor
        self.pipe = pipe
        self._opening = bytearray()
        self._count = 0
        self._over = False
        self.kind = kind
        self.stream: Stream | None = None
        pipe.write(acceptor.greeting)

    def received(self, data: bytes | memoryview) -> None:
        if self._over or (self.stream is not None and not self.stream.is_on(self.pipe)):
            return  # what was on its way when the stream went on elsewhere, where it comes again
        try:
            self._check_amount(len(data))
            if self.stream is None:
                data = self._opened(memoryview(data))
            if self.stream is not None:
                self._acceptor.heard(self.stream)
                self.stream.feed(data)
        except Garbled as error:
            log.warning("a connection to the tunnel is closed: %s", error)
            self.close()

    def _check_amount(self, more: int) -> None:
        self._count += more
        if self._count > MAX_STRANGER_BYTES and self._acceptor.is_stranger(self):
            raise Garbled("it says much and proves nothing")

    def _opened(self, data: memoryview) -> memoryview:
        """What follows the opening. Raises Garbled."""
        missing = OPENING.size - len(self._opening)
        self._opening += data[:missing]
        if len(self._opening) == OPENING.size:
            stream_id, seen = OPENING.unpack(self._opening)
            stream = self._acceptor.find(stream_id, self.kind)
            if stream is None:
                self.pipe.write(OPENING.pack(NEW_STREAM, 0))
                self.close()
            else:
                self.pipe.write(OPENING.pack(stream.id, stream.received))
                stream.attach(self.pipe, seen)
                self.stream = stream
                self._acceptor.attached(self)
        return data[missing:]

    def close(self) -> None:
        self.pipe.close()
        self.lost()

    def lost(self) -> None:
        self._over = True
        if self.stream is not None:
            self.stream.detach(self.pipe)
        self._acceptor.lost(self)


@dataclass(eq=False)
class _Kept:
    """A stream whose client has proved itself: it outlives its pipes. `heard_at` and the timer are
    the event loop's."""

    stream: Stream
    kind: Kind
    heard_at: float
    timer: asyncio.TimerHandle


class Acceptor:
    """`on_stream` gets each new stream, and calls `keep` once its client has proved itself."""

    def __init__(self, tunnel_id: str, on_stream: Callable[[Stream, Kind], None]) -> None:
        self.greeting = GREETING + tunnel_id.encode() + b"\n"
        self._on_stream = on_stream
        self._kept: dict[bytes, _Kept] = {}
        self._strangers: dict[Incoming, asyncio.TimerHandle] = {}
        """In the order in which they came."""

    def pipe(self, pipe: Pipe, kind: Kind) -> Incoming:
        if len(self._strangers) >= MAX_STRANGERS:
            self._expel(next(iter(self._strangers)), "too many connections prove nothing")
        incoming = Incoming(self, pipe, kind)
        loop = asyncio.get_running_loop()
        reason = "it has not proved who it is"
        self._strangers[incoming] = loop.call_later(STRANGER_SECONDS, self._expel, incoming, reason)
        return incoming

    def is_stranger(self, incoming: Incoming) -> bool:
        return incoming in self._strangers

    def keep(self, stream: Stream) -> None:
        """Its client has proved itself: from now on it outlives its pipes."""
        for incoming in self._strangers:
            if incoming.stream is stream:
                self._know(incoming)
                loop = asyncio.get_running_loop()
                timer = loop.call_later(WAIT_SECONDS / 2, self._look, stream.id)
                self._kept[stream.id] = _Kept(stream, incoming.kind, loop.time(), timer)
                return

    def close(self) -> None:
        for incoming in list(self._strangers):
            self._expel(incoming, "the tunnel ends")
        for kept in list(self._kept.values()):
            kept.stream.close()
            self._forget(kept, "the tunnel ends")

    # --- for Incoming -----------------------------------------------------------------------------

    def find(self, stream_id: bytes, kind: Kind) -> Stream | None:
        """The stream of that id, or a new one; None where there is no such one."""
        if stream_id == NEW_STREAM:
            return Stream(secrets.token_bytes(ID_BYTES))
        kept = self._kept.get(stream_id)
        if kept is None or kept.kind != kind or kept.stream.ended:
            return None
        return kept.stream

    def attached(self, incoming: Incoming) -> None:
        stream = incoming.stream
        assert stream is not None
        if stream.id in self._kept:
            self._know(incoming)
        else:
            self._on_stream(stream, incoming.kind)

    def heard(self, stream: Stream) -> None:
        if stream.id in self._kept:
            self._kept[stream.id].heard_at = asyncio.get_running_loop().time()

    def lost(self, incoming: Incoming) -> None:
        """A stranger's stream ends with it."""
        self._expel(incoming, "the connection ended")

    # --- ends -------------------------------------------------------------------------------------

    def _know(self, incoming: Incoming) -> None:
        self._strangers.pop(incoming).cancel()

    def _expel(self, incoming: Incoming, reason: str) -> None:
        timer = self._strangers.pop(incoming, None)
        if timer is not None:
            timer.cancel()
            incoming.close()
            if incoming.stream is not None:
                incoming.stream.end(reason)

    def _look(self, stream_id: bytes) -> None:
        kept = self._kept[stream_id]
        loop = asyncio.get_running_loop()
        silence = loop.time() - kept.heard_at
        if kept.stream.ended or silence >= WAIT_SECONDS:
            self._forget(kept, "the mount did not come back")
            return
        wait = WAIT_SECONDS / 2
        if silence >= wait:
            kept.stream.ask()
            wait = WAIT_SECONDS
        kept.timer = loop.call_later(wait - silence, self._look, stream_id)

    def _forget(self, kept: _Kept, reason: str) -> None:
        kept.timer.cancel()
        del self._kept[kept.stream.id]
        kept.stream.end(reason)
