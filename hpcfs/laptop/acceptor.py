"""The laptop's end of every stream: assigns pipes to streams and limits how long each waits.

Other users can reach a tunnel's port on a login node. A new connection counts as a stranger until
it has passed the handshake, for which it must have read the tunnel's file (tunnel/knock.py). Until
then only the connection itself is kept for it, and it is the first to be closed. After that the
stream's client must prove its keys, which costs more, so such connections too are limited in time,
bytes and number.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from hpcfs.laptop.strangers import Admission, Strangers, Tally
from hpcfs.tunnel.knock import KNOCK_BYTES, NONCE_BYTES, TunnelHandshake
from hpcfs.tunnel.stream import ID_BYTES, NEW_STREAM, Pipe, ProtocolViolation, TunnelStream

log = logging.getLogger(__name__)

EndpointKind = Literal["unix", "tcp"]
"""The kind of endpoint that a pipe came through, which decides what its client must prove."""

WAIT_SECONDS = 120.0
"""Seconds that a stream is kept without a sign of life; after half of it the mount is asked for
one, since its machine may have gone silently. A mount gives up much earlier
(remotes/tunnel/line.py); a laptop that wakes up should find the stream that the mount still has."""
MAX_STRANGERS = 160
"""Each stranger is a channel of the login node's sshd, which searches all of them for each new one,
and a file descriptor, of which sshd may have 1024."""
ADMITTED_PER_SECOND = 400.0
"""Connections. So each stranger has 0.4 s for the handshake, which takes one round trip between
laptop and login node."""
MAX_STREAMS = 512
"""A mount has one; a mount on the login node has seven."""
MAX_PROVING = 100
"""Clients. The mounts of a job on many nodes come all at once."""
MAX_PROVING_BYTES = 64 * 1024
"""An SSH handshake needs a tenth of it."""


class Incoming:
    """A pipe at our end: call `received` with the bytes that arrive and `lost` when it broke."""

    def __init__(self, acceptor: Acceptor, pipe: Pipe, kind: EndpointKind) -> None:
        self._acceptor = acceptor
        self.pipe = pipe
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._came = bytearray()
        self._count = 0
        self._over = False
        self.kind = kind
        self.stream: TunnelStream | None = None
        pipe.write(acceptor.handshake.greeting(self._nonce))

    def received(self, data: bytes | memoryview) -> None:
        """Process bytes: first the handshake, then frames for the stream."""
        if self._over or (self.stream is not None and not self.stream.is_on(self.pipe)):
            return  # in flight when the stream moved to another pipe, where it is sent again
        try:
            if self.stream is None:
                data = self._knocked(memoryview(data))
            if self.stream is not None:
                self._check_amount(len(data))
                self._acceptor.heard(self.stream)
                self.stream.feed(data)
        except ProtocolViolation as error:
            self._acceptor.refused(self, error)
            self.close()

    def _check_amount(self, more: int) -> None:
        self._count += more
        if self._count > MAX_PROVING_BYTES and self._acceptor.is_proving(self):
            raise ProtocolViolation("it says much and proves nothing")

    def _knocked(self, data: memoryview) -> memoryview:
        """Process the handshake, and return the bytes that follow it. Raises ProtocolViolation."""
        missing = KNOCK_BYTES - len(self._came)
        self._came += data[:missing]
        if len(self._came) == KNOCK_BYTES:
            nonces = self._nonce + bytes(self._came[:NONCE_BYTES])
            handshake = self._acceptor.handshake
            wanted, seen = handshake.unseal(b"client", nonces, bytes(self._came[NONCE_BYTES:]))
            stream = self._acceptor.find(wanted, self.kind)
            found = (NEW_STREAM, 0) if stream is None else (stream.id, stream.received)
            self.pipe.write(handshake.seal(b"server", nonces, *found))
            if stream is None:
                self.close()
            else:
                stream.attach(self.pipe, seen)
                self.stream = stream
                self._acceptor.attached(self)
        return data[missing:]

    def close(self) -> None:
        """Close the pipe."""
        self.pipe.close()
        self.lost()

    def lost(self) -> None:
        """Detach the broken pipe from its stream."""
        self._over = True
        if self.stream is not None:
            self.stream.detach(self.pipe)
        self._acceptor.lost(self)


@dataclass(eq=False)
class _ProvedStream:
    """A stream whose client has proved its keys, and which therefore outlives its pipes. `heard_at`
    is in the event loop's time."""

    stream: TunnelStream
    kind: EndpointKind
    heard_at: float
    timer: asyncio.TimerHandle


class Acceptor:
    """Holds all pipes and streams. `on_stream` gets each new stream, and calls `keep` once the
    client has proved its keys."""

    def __init__(
        self, handshake: TunnelHandshake, on_stream: Callable[[TunnelStream, EndpointKind], None]
    ) -> None:
        self.handshake = handshake
        self._on_stream = on_stream
        self._kept: dict[bytes, _ProvedStream] = {}
        self._strangers = Strangers(MAX_STRANGERS, self._expel)
        self._proving = Strangers(MAX_PROVING, self._expel)
        """Pipes that passed the handshake, and on whose streams the keys are still to be proved."""
        self._admission = Admission(ADMITTED_PER_SECOND)
        self._tally = Tally()

    def has_room(self) -> bool:
        """Return whether to open another connection to a port; anybody may have made it."""
        if self._admission.admits():
            return True
        self._tally.note()
        return False

    def pipe(self, pipe: Pipe, kind: EndpointKind) -> Incoming:
        """Register a new pipe, and send it the greeting."""
        incoming = Incoming(self, pipe, kind)
        self._strangers.add(incoming)
        return incoming

    def is_proving(self, incoming: Incoming) -> bool:
        """Return whether the pipe's client has passed the handshake but not proved its keys."""
        return incoming in self._proving

    def keep(self, stream: TunnelStream) -> None:
        """Keep the stream beyond its pipes from now on, since its client has proved its keys."""
        for incoming in self._proving.all():
            if incoming.stream is stream:
                self._proving.remove(incoming)
                loop = asyncio.get_running_loop()
                timer = loop.call_later(WAIT_SECONDS / 2, self._check_silence, stream.id)
                self._kept[stream.id] = _ProvedStream(stream, incoming.kind, loop.time(), timer)
                return

    def close(self) -> None:
        """Close all pipes and end all streams."""
        for incoming in (*self._strangers.all(), *self._proving.all()):
            incoming.close()
        for kept in list(self._kept.values()):
            kept.stream.close()
            self._forget(kept, "the tunnel ends")
        self._tally.close()

    # --- for Incoming -----------------------------------------------------------------------------

    def find(self, stream_id: bytes, kind: EndpointKind) -> TunnelStream | None:
        """Return the stream with that id, or a new one; None where there is none or no room."""
        if stream_id == NEW_STREAM:
            full = len(self._kept) >= MAX_STREAMS
            return None if full else TunnelStream(secrets.token_bytes(ID_BYTES))
        kept = self._kept.get(stream_id)
        if kept is None or kept.kind != kind or kept.stream.ended:
            return None
        return kept.stream

    def attached(self, incoming: Incoming) -> None:
        """Note that the pipe now carries a stream; announce a new stream to `on_stream`."""
        stream = incoming.stream
        assert stream is not None
        self._strangers.remove(incoming)
        if stream.id not in self._kept:
            self._proving.add(incoming)
            self._on_stream(stream, incoming.kind)

    def heard(self, stream: TunnelStream) -> None:
        """Note that the stream's client is alive."""
        if stream.id in self._kept:
            self._kept[stream.id].heard_at = asyncio.get_running_loop().time()

    def refused(self, incoming: Incoming, error: ProtocolViolation) -> None:
        """Log, or count, a connection that broke the protocol."""
        if incoming in self._strangers:
            self._tally.note()
        else:
            log.warning("a connection to the tunnel is closed: %s", error)

    def lost(self, incoming: Incoming) -> None:
        """Forget the pipe. A stream whose client had yet to prove its keys ends with it."""
        self._strangers.remove(incoming)
        if self._proving.remove(incoming) and incoming.stream is not None:
            incoming.stream.end("the connection ended")

    # --- ends -------------------------------------------------------------------------------------

    def _expel(self, incoming: Incoming, reason: str) -> None:
        self._tally.note()
        incoming.close()
        if incoming.stream is not None:
            incoming.stream.end(reason)

    def _check_silence(self, stream_id: bytes) -> None:
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
        kept.timer = loop.call_later(wait - silence, self._check_silence, stream_id)

    def _forget(self, kept: _ProvedStream, reason: str) -> None:
        kept.timer.cancel()
        del self._kept[kept.stream.id]
        kept.stream.end(reason)
