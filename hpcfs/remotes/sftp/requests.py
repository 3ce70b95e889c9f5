"""Requests and their answers on one SFTP channel.

The single requests and the encoding of attributes and errors are asyncssh's (SFTPClientHandler, the
layer below its SFTPClient). What goes over the channel is ours, because reading is what a user
waits for: answers come straight from the channel to who waits, without a stream reader and a task
between; a file's bytes are not joined (remotes/sftp/decoder.py); a read is a future, not a task;
and requests made in one turn of the event loop leave in one SSH packet.
"""

from __future__ import annotations

import asyncio
import stat
import struct
from collections.abc import Coroutine
from functools import partial
from typing import Any, Protocol, cast

from asyncssh import SFTPAttrs, SFTPBadMessage, SFTPConnectionLost, SFTPError, SFTPFailure
from asyncssh.constants import (
    FXF_EXCL,
    FXF_READ,
    FXP_CLOSE,
    FXP_NAME,
    FXP_READ,
    FXP_READDIR,
    FXP_STATUS,
    FXP_SYMLINK,
)
from asyncssh.logging import SSHLogger
from asyncssh.packet import PacketDecodeError, SSHPacket
from asyncssh.sftp import SFTPClientHandler

from hpcfs.remotes.sftp.decoder import DataSink, Malformed, MessageDecoder
from hpcfs.remotes.sftp.handles import Handles
from hpcfs.remotes.sftp.name_reply import Listed, type_in_line, usual_names

SFTP_VERSION = 3
SHOWN_ERRORS = "replace"
"""How a server's texts are decoded."""
LARGE_BYTES = 16 * 1024
"""A message from this size on is not copied together with others."""
BEGINNING_BYTES = 300
MESSAGE_SECONDS = 60.0
"""The longest that a message may take from its first byte to its last, apart from the time of its
bytes over a link of SLOWEST_BYTES per second. After a length that was wrong, a server's further
answers count as the rest of that message, and nobody would get any."""
SLOWEST_BYTES = 2000

_HEAD = struct.Struct(">IB")
_READ = struct.Struct(">QI")

Chunks = list[bytes]


class Carrier(Protocol):
    """Carries the bytes of the requests: an asyncssh channel, or something like one."""

    @property
    def logger(self) -> SSHLogger:
        """The logger of asyncssh, for its SFTP layer."""
        ...

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what asyncssh asks of a channel; `default` where it is not known."""
        ...

    def write(self, data: bytes) -> None:
        """Send bytes, without waiting."""
        ...

    def close(self) -> None:
        """Close the channel."""
        ...

    def is_closing(self) -> bool:
        """Return whether nothing can be sent any more."""
        ...


class _Piece:
    """One read under way: a DataSink."""

    def __init__(self, wanted: int, future: asyncio.Future[Chunks]) -> None:
        self.wanted = wanted
        self.future = future
        self.chunks: Chunks = []
        self.add = self.chunks.append

    def end(self) -> None:
        if not self.future.done():
            self.future.set_result(self.chunks)


class Requests(SFTPClientHandler):
    """The requests on one channel. Feed `received` what comes; call `lost` when nothing more
    will."""

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        loop = asyncio.get_running_loop()
        end = cast(Any, carrier)  # of a reader and a writer, what the base class uses of them
        super().__init__(loop, SHOWN_ERRORS, end, end, SFTP_VERSION)
        self._decoder = MessageDecoder(self)
        self._message_began = 0.0
        self._received_before = 0
        self._pieces: dict[int, _Piece] = {}
        self.bytes_asked_for = 0
        """Of files, and not here yet."""
        self.received_bytes = 0
        self._first_message: asyncio.Future[SSHPacket] = loop.create_future()
        self._first_message.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._to_send: list[bytes] = []
        self.beginning = b""
        """The first bytes that came: they may be text of a login script."""
        self.ended = False
        self.made_no_sense = False
        """Whether the channel ended because of what the server sent."""
        self.handles = Handles()
        """Those of all channels of a session, once it is one of them."""

    @property
    def under_way(self) -> int:
        """How many requests wait for their answer."""
        return len(self._requests)

    # --- sending --------------------------------------------------------------------------------

    def read_piece(self, handle: bytes, offset: int, length: int) -> asyncio.Future[Chunks]:
        """Ask for at most `length` bytes -> a future. SFTPEOFError where the file ends before
        `offset`."""
        future: asyncio.Future[Chunks] = self._loop.create_future()
        self._pieces[self._next_pktid] = _Piece(length, future)
        self.bytes_asked_for += length
        place = _READ.pack(offset, length)
        self._send_request(FXP_READ, (_string(handle), place), cast(Any, future))
        return future

    async def names(self, handle: bytes) -> list[Listed]:
        """Return some names of an open directory. Raises SFTPEOFError where there are no more."""
        waiter: asyncio.Future[tuple[int, SSHPacket]] = self._loop.create_future()
        self._send_request(FXP_READDIR, (_string(handle),), cast(Any, waiter))
        kind, packet = await waiter
        if kind != FXP_NAME:
            raise _refusal(kind, packet)
        usual = usual_names(packet.get_remaining_payload())
        if usual is not None:
            return usual
        found, _ = self._process_name(packet)
        for name in found:
            mode = name.attrs.permissions
            if mode is not None and not stat.S_IFMT(mode):
                name.attrs.permissions = mode | type_in_line(cast(bytes, name.longname or b""))
        return [(cast(bytes, name.filename), name.attrs) for name in found]

    async def symlink_paths(self, first: bytes, second: bytes) -> None:
        """Send SSH_FXP_SYMLINK with the paths in this order: which of them is the link is the
        server's to say (links.py)."""
        await self._make_request(FXP_SYMLINK, _string(first), _string(second))

    async def open(self, filename: bytes, pflags: int, attrs: SFTPAttrs) -> bytes:
        """Open a file -> its handle. Waits where the server grants no more handles now."""
        attempt = partial(super().open, filename, pflags, attrs)
        is_new = bool(pflags & FXF_EXCL)
        explained = partial(self._is_explained, filename, None if is_new else stat.S_IFREG)
        return await self.handles.granted(attempt, self._can_open, explained)

    async def open_spare(self, filename: bytes, pflags: int) -> bytes:
        """Open a file with a handle that can be done without. Raises SFTPFailure where there are
        few."""
        return await self.handles.spare(partial(super().open, filename, pflags, SFTPAttrs()))

    async def opendir(self, path: bytes) -> bytes:
        """Open a directory -> its handle. Waits where the server grants no more handles now."""
        explained = partial(self._is_explained, path, stat.S_IFDIR)
        return await self.handles.granted(partial(super().opendir, path), self._can_list, explained)

    async def _can_list(self, path: bytes | None) -> bool | None:
        """Return whether a directory can be opened: some servers bound files and directories
        apart."""
        return await self._can_open(None)

    async def _is_explained(self, path: bytes, kind: int | None) -> bool:
        """Whether a refusal of this path is no wonder, as it is of another kind, or (None) is not
        new."""
        try:
            found = (await self.stat(path, 0)).permissions or 0
        except SFTPError:
            return kind is not None
        return kind is None or stat.S_IFMT(found) not in (0, kind)

    async def _can_open(self, path: bytes | None) -> bool | None:
        """Whether anything can be opened: a file that could be, or the home directory. None where
        the answer tells nothing."""
        opening = (
            super().opendir(b".") if path is None else super().open(path, FXF_READ, SFTPAttrs())
        )
        try:
            handle = await opening
        except SFTPFailure:
            return False
        except SFTPError:
            return None
        self._send_close(handle)
        return True

    async def close(self, handle: bytes) -> None:
        """Close a handle. Raises what the server reports, a failed write too."""
        self.handles.closed()
        await super().close(handle)

    async def kept(self, opening: Coroutine[Any, Any, bytes]) -> bytes:
        """Return the handle that an open brings. Where the caller is cancelled, it is closed once
        it is here: servers have few, and this connection may last for weeks."""
        task = asyncio.ensure_future(opening)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._close_late)
            raise

    def _close_late(self, opening: asyncio.Task[bytes]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.close_soon(opening.result())

    def close_soon(self, handle: bytes) -> None:
        """Close a handle without waiting for the answer, on which nothing depends."""
        self.handles.closed()
        self._send_close(handle)

    def _send_close(self, handle: bytes) -> None:
        if not self.ended:
            ignored: asyncio.Future[Any] = self._loop.create_future()
            ignored.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._send_request(FXP_CLOSE, (_string(handle),), ignored)

    def send_packet(self, pkttype: int, pktid: int | None, *args: bytes) -> None:
        """Send a message together with others of this turn of the event loop (asyncssh calls
        this)."""
        if self.ended:
            raise SFTPConnectionLost("Connection closed")
        body = b"".join(args)
        self._to_send.append(_HEAD.pack(len(body) + 1, pkttype))
        self._to_send.append(body)
        if len(body) >= LARGE_BYTES:
            self._flush()
        elif len(self._to_send) == 2:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        data = b"".join(self._to_send)
        self._to_send.clear()
        if data and not self.ended and not self._carrier.is_closing():
            try:
                self._carrier.write(data)
            except OSError as error:
                self.lost(error)

    # --- receiving ------------------------------------------------------------------------------

    async def recv_packet(self) -> SSHPacket:
        """Return the first message (asyncssh's `start` calls this)."""
        return await self._first_message

    def received(self, data: bytes | memoryview) -> None:
        """Take bytes that came; what makes no sense ends the channel."""
        self.received_bytes += len(data)
        if not self._first_message.done() and len(self.beginning) < BEGINNING_BYTES:
            self.beginning += bytes(data[:BEGINNING_BYTES])
        now, begun = self._loop.time(), self._decoder.begun
        try:
            self._decoder.feed(data)
        except (Malformed, PacketDecodeError) as error:
            self._give_up(str(error))
        if self._decoder.begun != begun:
            self._message_began, self._received_before = now, self.received_bytes
        elif self._decoder.is_inside and now > self._message_ends():
            self._give_up(f"a message does not end within {now - self._message_began:.0f} s")

    def _message_ends(self) -> float:
        """Return when the message that has begun must have ended, as far as its bytes came."""
        came = self.received_bytes - self._received_before
        return self._message_began + MESSAGE_SECONDS + came / SLOWEST_BYTES

    def _give_up(self, reason: str) -> None:
        """End a channel on which nothing can be made of what comes. Requests that wait are not to
        blame: they may be made again on another one."""
        self.made_no_sense = True
        if not self._first_message.done():
            self._first_message.set_exception(SFTPBadMessage(reason))
        self.lost(SFTPConnectionLost(f"it sent what makes no sense: {reason}"))

    def message(self, message: bytes) -> None:
        """Take a whole message (the decoder calls this)."""
        if self.ended:
            return
        packet = SSHPacket(message)
        if not self._first_message.done():
            self._first_message.set_result(packet)
            return
        kind, number = packet.get_byte(), packet.get_uint32()
        if number not in self._requests:
            raise Malformed("an answer that nobody waits for")
        waiter = self._requests.pop(number)
        piece = self._answered(number)
        if waiter.done():
            pass  # given up meanwhile
        elif piece is None:
            waiter.set_result((kind, packet))
        else:
            waiter.set_exception(_refusal(kind, packet))

    def data(self, request: int, length: int) -> DataSink | None:
        """Say where the bytes of a read go (the decoder calls this)."""
        piece = self._answered(request)
        if piece is None:
            raise Malformed("bytes that nobody asked for")
        del self._requests[request]
        if piece.future.done():
            return None
        if length > piece.wanted:
            piece.future.set_exception(SFTPBadMessage("more bytes than asked for"))
            return None
        return piece

    def _answered(self, request: int) -> _Piece | None:
        piece = self._pieces.pop(request, None)
        if piece is not None:
            self.bytes_asked_for -= piece.wanted
        return piece

    def lost(self, error: Exception | None) -> None:
        """Fail all requests once: the channel has ended, or what came over it makes no sense."""
        if self.ended:
            return
        self.ended = True
        reason = error or SFTPConnectionLost("Connection closed")
        waiters: list[asyncio.Future[Any]] = [self._first_message, *self._requests.values()]
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(reason)
        self._requests.clear()
        self._pieces.clear()
        self._carrier.close()

    async def _cleanup(self, exc: Exception | None) -> None:
        self.lost(exc)


def _string(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def _refusal(kind: int, packet: SSHPacket) -> Exception:
    """Why there is nothing."""
    if kind != FXP_STATUS:
        return SFTPBadMessage(f"Unexpected response type: {kind}")
    try:
        error = SFTPError.construct(packet, SHOWN_ERRORS)
    except (SFTPBadMessage, PacketDecodeError) as bad:
        return SFTPBadMessage(str(bad))
    return error or SFTPBadMessage("Unexpected FX_OK response")
