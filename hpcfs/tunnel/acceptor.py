"""The laptop's end of every stream: which pipe carries which, and how long one waits for the next.

Others can reach the port of a tunnel on a login node: a stream whose client has proved nothing yet
ends with its pipe, or after a few seconds, and there are few of them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Literal

from hpcfs.rendezvous.stream import GREETING, ID_BYTES, NEW_STREAM, OPENING, Garbled, Pipe, Stream

log = logging.getLogger(__name__)

Kind = Literal["unix", "tcp"]
"""Which kind of place a pipe came through: what is to be proved over it differs."""

WAIT_SECONDS = 120.0
"""How long a stream without a pipe is kept. A mount gives up much earlier (remotes/tunnel/line.py);
a laptop that wakes up should find the stream that the mount still has."""
STRANGER_SECONDS = 10.0
MAX_STRANGERS = 32


class Incoming:
    """A pipe at our end: feed `received` what comes on it, call `lost` when it broke."""

    def __init__(self, acceptor: Acceptor, pipe: Pipe, kind: Kind) -> None:
        self._acceptor = acceptor
        self._pipe = pipe
        self._opening = bytearray()
        self.kind = kind
        self.stream: Stream | None = None
        pipe.write(acceptor.greeting)

    def received(self, data: bytes | memoryview) -> None:
        try:
            if self.stream is None:
                data = self._opened(memoryview(data))
            if self.stream is not None:
                self.stream.feed(data)
        except Garbled as error:
            log.warning("a connection to the tunnel is closed: %s", error)
            self._pipe.close()
            self.lost()

    def _opened(self, data: memoryview) -> memoryview:
        """What follows the opening."""
        missing = OPENING.size - len(self._opening)
        self._opening += data[:missing]
        if len(self._opening) == OPENING.size:
            stream_id, seen = OPENING.unpack(self._opening)
            self.stream = self._acceptor.find(stream_id, self.kind)
            if self.stream is None:
                self._pipe.write(OPENING.pack(NEW_STREAM, 0))
                self._pipe.close()
            else:
                self._pipe.write(OPENING.pack(self.stream.id, self.stream.received))
                self.stream.attach(self._pipe, seen)
                self._acceptor.attached(self.stream, self.kind)
        return data[missing:]

    def lost(self) -> None:
        if self.stream is not None:
            self.stream.detach(self._pipe)
            self._acceptor.detached(self.stream)


class Acceptor:
    """`on_stream` gets each new stream, and calls `keep` once its client has proved itself."""

    def __init__(self, tunnel_id: str, on_stream: Callable[[Stream, Kind], None]) -> None:
        self.greeting = GREETING + tunnel_id.encode() + b"\n"
        self._on_stream = on_stream
        self._streams: dict[bytes, tuple[Stream, Kind]] = {}
        self._new: set[bytes] = set()
        self._kept: set[bytes] = set()
        self._timers: dict[bytes, asyncio.TimerHandle] = {}

    def pipe(self, pipe: Pipe, kind: Kind) -> Incoming:
        return Incoming(self, pipe, kind)

    def keep(self, stream: Stream) -> None:
        """Its client has proved itself: from now on it outlives its pipes."""
        self._kept.add(stream.id)
        self._cancel_timer(stream)

    def close(self) -> None:
        for stream, _ in list(self._streams.values()):
            stream.close()
            self._forget(stream, "the tunnel ends")

    def find(self, stream_id: bytes, kind: Kind) -> Stream | None:
        """The stream of that id, or a new one; None where there is no such one, or too many."""
        self._sweep()
        if stream_id != NEW_STREAM:
            stream, came_by = self._streams.get(stream_id, (None, kind))
            return stream if came_by == kind and stream_id in self._kept else None
        if len(self._streams) - len(self._kept) >= MAX_STRANGERS:
            log.warning("too many connections to the tunnel have not proved who they are")
            return None
        stream = Stream(secrets.token_bytes(ID_BYTES))
        self._streams[stream.id] = stream, kind
        self._new.add(stream.id)
        return stream

    def attached(self, stream: Stream, kind: Kind) -> None:
        self._cancel_timer(stream)
        if stream.id in self._new:
            self._new.discard(stream.id)
            self._end_after(STRANGER_SECONDS, stream, "it has not proved who it is")
            self._on_stream(stream, kind)

    def detached(self, stream: Stream) -> None:
        if stream.attached or stream.ended:  # by a newer pipe
            return
        if stream.id in self._kept:
            self._end_after(WAIT_SECONDS, stream, "the mount did not come back")
        else:
            self._forget(stream, "the connection ended")

    def _end_after(self, seconds: float, stream: Stream, reason: str) -> None:
        self._cancel_timer(stream)
        loop = asyncio.get_running_loop()
        self._timers[stream.id] = loop.call_later(seconds, self._forget, stream, reason)

    def _cancel_timer(self, stream: Stream) -> None:
        timer = self._timers.pop(stream.id, None)
        if timer is not None:
            timer.cancel()

    def _forget(self, stream: Stream, reason: str) -> None:
        self._cancel_timer(stream)
        self._streams.pop(stream.id, None)
        self._kept.discard(stream.id)
        self._new.discard(stream.id)
        stream.end(reason)

    def _sweep(self) -> None:
        """Those that ended by themselves."""
        for stream, _ in list(self._streams.values()):
            if stream.ended:
                self._forget(stream, "")
