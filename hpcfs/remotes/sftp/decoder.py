"""Decodes a stream of bytes to SFTP's messages, without joining what is large.

Owns where messages begin and end. The bytes of a file are handed on in the chunks in which they
came, to whoever asked for them; every other message is small and is handed on whole. Nothing here
waits or sends.
"""

from __future__ import annotations

from typing import Protocol

from asyncssh.constants import FXP_DATA
from asyncssh.sftp import MAX_SFTP_PACKET_LEN

LENGTH_BYTES = 4
ID_END = 9
"""Where a message's request number ends: length, type, number."""
DATA_START = 13
"""Where the bytes of a data message begin: then comes their number."""


class Malformed(Exception):
    """Raised for bytes that are no SFTP message."""


class DataSink(Protocol):
    """Takes the bytes of one data message."""

    def add(self, chunk: bytes) -> None:
        """Take the next bytes."""
        ...

    def end(self) -> None:
        """Note that all bytes have come."""
        ...


class MessageSink(Protocol):
    """Takes the messages that a decoder finds."""

    def message(self, message: bytes) -> None:
        """Take a whole message, from its type on."""
        ...

    def data(self, request: int, length: int) -> DataSink | None:
        """Return the sink of `length` bytes that begin here; None where nobody wants them any
        more."""
        ...


class MessageDecoder:
    """Finds the messages in a stream of bytes, and hands each to its sink."""

    def __init__(self, receiver: MessageSink) -> None:
        self._receiver = receiver
        self._message = bytearray()
        self._next_look = LENGTH_BYTES
        self._bytes: DataSink | None = None
        self._bytes_left = 0
        self.begun = 0
        """How many messages have begun."""

    @property
    def is_inside(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._message or self._bytes_left)

    def feed(self, received: bytes | memoryview) -> None:
        """Take the next bytes. Raises Malformed; nothing can be made of what comes after that."""
        view = memoryview(received)
        at = 0
        while at < len(view):
            if self._bytes_left:
                until = min(at + self._bytes_left, len(view))
                self._pass_on(view[at:until])
            else:
                self.begun += not self._message
                until = min(at + self._next_look - len(self._message), len(view))
                self._message += view[at:until]
                if len(self._message) == self._next_look:
                    self._look()
            at = until

    def _pass_on(self, view: memoryview) -> None:
        self._bytes_left -= len(view)
        if self._bytes is not None:
            self._bytes.add(bytes(view))
            if not self._bytes_left:
                self._bytes.end()

    def _look(self) -> None:
        """Look at a message of which as much is here as was waited for."""
        message = self._message
        end = LENGTH_BYTES + int.from_bytes(message[:LENGTH_BYTES], "big")
        if len(message) == LENGTH_BYTES:
            if not LENGTH_BYTES < end - LENGTH_BYTES <= MAX_SFTP_PACKET_LEN:
                raise Malformed(f"a message of {end - LENGTH_BYTES} bytes")
            self._next_look = min(end, DATA_START)
        elif len(message) == DATA_START and message[LENGTH_BYTES] == FXP_DATA:
            self._begin_bytes(end)
        elif len(message) < end:
            self._next_look = end
        else:
            self._next_message()
            self._receiver.message(bytes(message[LENGTH_BYTES:]))

    def _begin_bytes(self, end: int) -> None:
        request = int.from_bytes(self._message[LENGTH_BYTES + 1 : ID_END], "big")
        length = int.from_bytes(self._message[ID_END:DATA_START], "big")
        if DATA_START + length != end:
            raise Malformed("a data message whose two lengths differ")
        self._next_message()
        self._bytes = self._receiver.data(request, length)
        self._bytes_left = length
        if not length and self._bytes is not None:
            self._bytes.end()

    def _next_message(self) -> None:
        self._message = bytearray()
        self._next_look = LENGTH_BYTES
