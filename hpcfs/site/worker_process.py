"""A running transfer process, as the daemon sees it: the child, the socket to it, and its end.

Sending never waits: frames queue up here and are written one after the other, whole, whatever
becomes of the call that sent them. (Half a frame of a call that was given up would make everything
after it nonsense.) A process that ends, or says what can't be understood, is gone; site/client.py
then starts another one.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import struct
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
import trio

from hpcfs.model.errors import NotConnected, ProtocolError, Unreachable
from hpcfs.protocol import messages as m
from hpcfs.system import interpreter, logs

log = logging.getLogger(__name__)

_END_SECONDS = 3.0
"""How long a process may take to end by itself once its socket is closed."""
_FRAME_SECONDS = 10.0
"""The longest that a frame may take to arrive, which is milliseconds. After a length that was
wrong, all that follows would count as the rest of it."""
_GAP_SECONDS = 1.0
"""What counts, at most, of a time without bytes: one of us may have been stopped meanwhile."""
_RECEIVE_BYTES = 256 * 1024
MAX_NAME_BYTES = 256
_INT = struct.Struct("i")
_GONE = "the transfer process of this site ended; try again"


Lend = Callable[[str], int | None]


def lend_nothing(name: str) -> int | None:
    """Lend no file in memory."""
    return None


class WorkerProcess:
    """A running transfer process and the sockets to it; it lives as long as `run`."""

    def __init__(
        self,
        process: trio.Process,
        ours: socket.socket,
        files: socket.socket,
        lend: Lend = lend_nothing,
    ) -> None:
        self.pid = process.pid
        self.ended = False
        self._process = process
        self._socket = ours
        self._files = trio.socket.from_stdlib_socket(files)
        self._lend = lend
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self._waiting = 0
        """Frames in the outbox, and perhaps a part of one on its way."""
        self._outbox, self._frames = trio.open_memory_channel[bytes](math.inf)

    @classmethod
    async def start(
        cls, start: m.Start, log_file: Path, lend: Lend = lend_nothing
    ) -> WorkerProcess:
        """Start a process whose output goes to the log file.

        `lend` returns the descriptor of a file in memory. Raises OSError.
        """
        ours, theirs = socket.socketpair()
        files, their_files = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, their_files, _log(log_file) as log_stream:
            passed = (theirs.fileno(), their_files.fileno())
            process = await trio.lowlevel.open_process(
                interpreter.command("hpcfs.worker.main", *map(str, passed)),
                cwd=interpreter.SAFE_DIRECTORY,
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=log_stream,
                stderr=log_stream,
                start_new_session=True,  # Ctrl-C on the terminal is the daemon's to handle
            )
        child = cls(process, ours, files, lend)
        child.send(start)
        return child

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; never waits. Raises NotConnected when the process has ended."""
        if self.ended:
            raise NotConnected(_GONE)
        rest = self._send_now(m.frame(message))
        if rest:
            self._waiting += 1
            self._outbox.send_nowait(rest)

    def _send_now(self, frame: bytes) -> bytes:
        """Send what fits, and return the rest: a task for it would cost a small request a tenth."""
        if self._waiting:
            return frame
        try:
            return frame[self._socket.send(frame, socket.MSG_DONTWAIT) :]
        except OSError:  # no room now; or the process is gone, which `run` will notice
            return frame

    def kill(self) -> None:
        """Kill the process, which no longer does what it is told."""
        if not self.ended:
            log.warning("the transfer process %d does not answer: it is killed", self.pid)
            self._process.kill()

    def is_not_understood(self, error: Exception) -> None:
        """Kill the process, which said something that makes no sense; another one takes over."""
        if not self.ended:
            log.error("the transfer process %d said what can't be understood: %s", self.pid, error)
            self._process.kill()

    async def run(self, dispatch: Callable[[m.FromWorker], None]) -> None:
        """Give every message to `dispatch`, until the process ends."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._lend_files)
                await self._read(dispatch)
                nursery.cancel_scope.cancel()
        finally:
            self.ended = True
            with trio.CancelScope(shield=True):
                await self._reap()
        log.warning("the transfer process %d ended (%s)", self.pid, self._process.returncode)

    async def _reap(self) -> None:
        self._files.close()
        await trio.aclose_forcefully(self._stream)
        with trio.move_on_after(_END_SECONDS):
            await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _write(self) -> None:
        try:
            async for frame in self._frames:
                await self._stream.send_all(frame)
                self._waiting -= 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("the transfer process %d reads no more", self.pid)

    async def _lend_files(self) -> None:
        """Each question is the name of a file in memory, each answer that name, and the file's
        descriptor if there is one."""
        with suppress(OSError):
            while name := await self._files.recv(MAX_NAME_BYTES):
                fd = self._lend(name.decode(errors="replace"))
                lent = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _INT.pack(fd))]
                await self._files.sendmsg([name], lent)

    async def _read(self, dispatch: Callable[[m.FromWorker], None]) -> None:
        decoder = msgspec.msgpack.Decoder(m.FromWorker)
        buffer = bytearray()
        took = came = 0.0
        while chunk := await self._receive():
            is_beginning = not buffer
            buffer += chunk
            before, came = came, trio.current_time()
            try:
                bodies = _take_frames(buffer)
                took = 0.0 if bodies or is_beginning else took + min(came - before, _GAP_SECONDS)
                if took > _FRAME_SECONDS:
                    raise ProtocolError("a frame without end")  # noqa: TRY301
                for body in bodies:
                    dispatch(decoder.decode(body))
            except (msgspec.DecodeError, RecursionError, ProtocolError) as error:
                self.is_not_understood(error)
                return
            except Exception:
                log.exception("a message of the transfer process %d failed here", self.pid)
                return

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(_RECEIVE_BYTES))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""


def _log(file: Path) -> BinaryIO:
    """A process whose words can't be kept is started all the same."""
    try:
        return os.fdopen(logs.open_private(file), "ab")
    except OSError as error:
        log.warning("what the transfer process says is not logged: %s", error)
        return Path(os.devnull).open("wb")


def gone() -> Unreachable:
    """Return the error for calls to a process that has ended."""
    return Unreachable(_GONE)


def _take_frames(buffer: bytearray) -> list[bytes]:
    """Removes the whole frames at the buffer's start and returns their bodies.

    Raises ProtocolError for a frame longer than any message may be.
    """
    bodies = []
    start = 0
    while len(buffer) - start >= m.FRAME_HEADER.size:
        (length,) = m.FRAME_HEADER.unpack_from(buffer, start)
        if length > m.MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {length} bytes")
        body = start + m.FRAME_HEADER.size
        if len(buffer) < body + length:
            break
        bodies.append(bytes(memoryview(buffer)[body : body + length]))
        start = body + length
    del buffer[:start]
    return bodies
