"""A byte stream that outlives the connections that carry it.

A stream has two ends and, one after the other, any number of pipes between them. A pipe is any
connection that carries bytes in order until it breaks. An end buffers the bytes it wrote until the
other end acknowledges them; on a new pipe both ends state how much they have received, and the rest
is sent again. So nothing is lost or duplicated when an SSH connection is cut, and a request whose
answer was on its way is not sent twice.

On a pipe (integers are big-endian):

    server   GREETING, the tunnel's id and a nonce, both in hex, a newline
    client   a nonce; sealed (tunnel/knock.py): the stream's id (16 bytes; zeros ask for a new one),
             the number of bytes it has received (8 bytes)
    server   sealed: the stream's id (zeros: no such stream any more), the number of bytes received
    both     frames: a kind (1 byte) and a number (4 bytes): DATA is followed by that many bytes;
             SEEN by 8 bytes with the number of bytes its sender has received (its own number is 0);
             ASK requests a SEEN; END ends the stream

This module does no I/O: remotes/tunnel/line.py and laptop/acceptor.py provide and feed the pipes.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

ID_BYTES = 16
NEW_STREAM = bytes(ID_BYTES)

DATA, SEEN, ASK, END = b"DSAE"
HEAD = struct.Struct(">BI")
_COUNT = struct.Struct(">Q")
FRAME_BYTES = 1024 * 1024
SEEN_EVERY_BYTES = 256 * 1024
"""Received bytes after which a SEEN is sent: the sender buffers that much longer than it must."""
MAX_UNACKNOWLEDGED_BYTES = 128 * 1024 * 1024
"""More than a mount's requests and their answers can add up to (sftp/flow.py): an end with more
unacknowledged bytes ends the stream."""

ANSWERS_EVERY_SECONDS = 0.1
"""An ASK that comes sooner after the last one is ignored. Otherwise answers that the other end does
not read would pile up without limit, since nothing acknowledges them. An honest end asks every two
seconds."""
MOST_EARLY_BYTES = 1024 * 1024


class ProtocolViolation(Exception):
    """The other end broke the protocol."""


class Pipe(Protocol):
    """A connection that carries bytes in order until it breaks."""

    def write(self, data: bytes) -> None:
        """Send bytes without blocking; errors are reported by the pipe's owner."""

    def close(self) -> None:
        """Close the connection."""


class TunnelStream:
    """One end of a stream. Data that arrives before `listen` is called is buffered."""

    def __init__(self, stream_id: bytes) -> None:
        self.id = stream_id
        self._early = bytearray()
        self._on_data: Callable[[memoryview], None] = self._keep
        self._on_end: Callable[[str], None] = _ignore
        self._reason = ""
        self.on_acknowledged: list[Callable[[], None]] = []
        """Called when the other end acknowledged bytes, so that `unacknowledged` became smaller."""
        self.received = 0
        self.ended = False
        self._pipe: Pipe | None = None
        self._unacknowledged: deque[bytes] = deque()
        self._seen = 0
        """Bytes written here that the other end acknowledged."""
        self._skip = 0
        """Acknowledged bytes at the beginning of the first item of `_unacknowledged`."""
        self.unacknowledged = 0
        self._reported = 0
        self._answered_at = 0.0
        self._head = bytearray()
        self._wanted = HEAD.size
        self._data_left = 0

    # --- reading --------------------------------------------------------------------------------

    def listen(self, on_data: Callable[[memoryview], None], on_end: Callable[[str], None]) -> None:
        """Register the listener.

        `on_data` gets each piece of data as it arrives. `on_end` gets the reason why the stream
        ended; it is empty where the other end closed it.
        """
        self._on_data, self._on_end = on_data, on_end
        early, self._early = self._early, bytearray()
        if early:
            on_data(memoryview(early))
        if self.ended:
            on_end(self._reason)

    def stop_listening(self, rest: bytes) -> None:
        """Remove the listener; the next one gets `rest` first."""
        self._on_data, self._on_end = self._keep, _ignore
        self._keep(rest)

    def _keep(self, data: bytes | memoryview) -> None:
        self._early += data
        if len(self._early) > MOST_EARLY_BYTES:
            raise ProtocolViolation("too much came before anybody listened")

    # --- writing --------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Send data, and buffer it until the other end acknowledges it."""
        if self.ended or not data:
            return
        self._unacknowledged.append(data)
        self.unacknowledged += len(data)
        if self._pipe is not None:
            _send(self._pipe, data)
        if self.unacknowledged > MAX_UNACKNOWLEDGED_BYTES:
            self.end("the other end takes nothing any more")

    def ask(self) -> None:
        """Request an acknowledgement, to learn whether the other end is alive."""
        if self._pipe is not None:
            self._pipe.write(HEAD.pack(ASK, 0))

    def close(self) -> None:
        """End the stream, and tell the other end if a pipe is attached."""
        if self._pipe is not None:
            self._pipe.write(HEAD.pack(END, 0))
        self.end("")

    def end(self, reason: str) -> None:
        """End the stream: drop the buffers, close the pipe, tell the listener the reason."""
        if self.ended:
            return
        self.ended = True
        self._unacknowledged.clear()
        self.unacknowledged = 0
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        self._reason = reason
        self._on_end(reason)

    # --- pipes ----------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether a pipe carries the stream now."""
        return self._pipe is not None

    def is_on(self, pipe: Pipe) -> bool:
        """Return whether this pipe carries the stream now."""
        return self._pipe is pipe

    def attach(self, pipe: Pipe, seen: int) -> None:
        """Continue on this pipe, whose other end has received `seen` of our bytes.

        Raises ProtocolViolation for an impossible number.
        """
        if not self._seen <= seen <= self._seen + self.unacknowledged:
            raise ProtocolViolation("the other end can't have what it says it has")
        self._forget(seen)
        if self._pipe is not None and self._pipe is not pipe:
            self._pipe.close()
        self._pipe = pipe
        self._head.clear()
        self._wanted, self._data_left = HEAD.size, 0
        self._reported = self.received
        self._answered_at = 0.0
        for number, data in enumerate(tuple(self._unacknowledged)):
            _send(pipe, data[self._skip :] if number == 0 else data)
        self._notify()

    def detach(self, pipe: Pipe) -> None:
        """Stop using that pipe, which broke or is about to be closed."""
        if self._pipe is pipe:
            self._pipe = None

    def feed(self, data: bytes | memoryview) -> None:
        """Process bytes that arrived on the pipe. Raises ProtocolViolation."""
        view = memoryview(data)
        while view and not self.ended:
            if self._data_left:
                part = view[: self._data_left]
                self._data_left -= len(part)
                self.received += len(part)
                view = view[len(part) :]
                self._on_data(part)
            else:
                taken = min(len(view), self._wanted - len(self._head))
                self._head += view[:taken]
                view = view[taken:]
                if len(self._head) == self._wanted:
                    self._headed()
        if self.received - self._reported >= SEEN_EVERY_BYTES:
            self._send_seen()

    def _headed(self) -> None:
        kind, number = HEAD.unpack_from(self._head)
        if kind == SEEN and len(self._head) == HEAD.size:
            self._wanted = HEAD.size + _COUNT.size
            return
        self._wanted = HEAD.size
        head = bytes(self._head)
        self._head.clear()
        if kind == DATA and 0 < number <= FRAME_BYTES:
            self._data_left = number
        elif kind == SEEN:
            self._other_received(_COUNT.unpack_from(head, HEAD.size)[0])
        elif kind == ASK:
            now = time.monotonic()
            if now - self._answered_at >= ANSWERS_EVERY_SECONDS:
                self._answered_at = now
                self._send_seen()
        elif kind == END:
            self.end("")
        else:
            raise ProtocolViolation(f"a frame of kind {kind} with {number} bytes")

    def _send_seen(self) -> None:
        self._reported = self.received
        if self._pipe is not None:
            self._pipe.write(HEAD.pack(SEEN, 0) + _COUNT.pack(self.received))

    def _other_received(self, seen: int) -> None:
        if not self._seen <= seen <= self._seen + self.unacknowledged:
            raise ProtocolViolation("the other end can't have what it says it has")
        self._forget(seen)
        self._notify()

    def _notify(self) -> None:
        for hear in self.on_acknowledged:
            hear()

    def _forget(self, seen: int) -> None:
        gone = seen - self._seen
        self._seen = seen
        self.unacknowledged -= gone
        gone += self._skip
        while self._unacknowledged and gone >= len(self._unacknowledged[0]):
            gone -= len(self._unacknowledged.popleft())
        self._skip = gone


def _send(pipe: Pipe, data: bytes) -> None:
    for start in range(0, len(data), FRAME_BYTES):
        part = data[start : start + FRAME_BYTES]
        pipe.write(HEAD.pack(DATA, len(part)) + part)


def _ignore(_: object) -> None:
    """The `on_end` callback while nobody listens."""
