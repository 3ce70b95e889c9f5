"""The answering side of the control socket, in the mount daemon (control.py defines the messages).

It answers only the user who mounted, and root. Whatever a client sends, or fails to send, ends that
client's connection and nothing else.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from hpcfs.control.control import (
    MAX_REQUEST_BYTES,
    ControlReply,
    ControlRequest,
    DaemonNotRunning,
    LoginAnswer,
    LoginQuestion,
    MountStatus,
    WorkProgress,
    open_wait,
)
from hpcfs.model.errors import SetupError
from hpcfs.system import ownership, paths

_LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # accept(2)
ACCEPT_PAUSE_SECONDS = 1.0
REQUEST_SECONDS = 10.0
STEP_INTERVAL = 0.1
"""Seconds between two progress lines."""
HEARTBEAT_SECONDS = 20.0
"""Seconds without news after which the last progress line is repeated, to show that the daemon is
alive."""

logger = logging.getLogger(__name__)

_held_until_exit: set[int] = set()
"""Descriptors of waiting clients. `serve` may end while the daemon still cleans up, so these
are left for the kernel to close when the process has ended: only then does the client see end
of file."""


class ReportProgress(Protocol):
    """Reports the work's progress to the client; the parameters are the fields of WorkProgress."""

    def __call__(
        self, done: int, total: int, files_done: int = 0, files_total: int = 0, reason: str = "", /
    ) -> Awaitable[None]:
        """Report bytes and files done and in total, and the reason of a standstill."""


Work = Callable[[ControlRequest, ReportProgress], Awaitable[ControlReply]]
"""Executes a request. Raises SetupError with a sentence for the user."""


AskClient = Callable[[str, bool], Awaitable[str | None]]
"""Puts a question to whoever runs the command: text and echo. None where nobody answers."""
LogIn = Callable[[ControlRequest, AskClient], Awaitable[ControlReply]]
"""Logs in, with somebody to ask."""


async def serve(
    path: Path,
    status: Callable[[], Awaitable[MountStatus]],
    work: Work | None = None,
    log_in: LogIn | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer at this path until cancelled. Raises SetupError where it can't listen there."""
    listener = _listen(path)
    try:
        task_status.started()
        answer = partial(_answer, status, work, log_in)
        async with listener, trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(_answer_safely, answer, await _accept(listener))
    finally:
        _remove(path)


async def _accept(listener: trio.SocketListener) -> trio.SocketStream:
    """Accept a client; where no descriptor is left for it, wait for one."""
    while True:
        try:
            return await listener.accept()
        except OSError as error:
            if error.errno not in _LACKING:
                raise
            logger.warning("a control request has to wait: %s", error.strerror)
            await trio.sleep(ACCEPT_PAUSE_SECONDS)


async def _answer_safely(
    answer: Callable[[trio.SocketStream], Awaitable[None]], stream: trio.SocketStream
) -> None:
    """Answer a client; nothing that goes wrong with it ends the mount."""
    try:
        await answer(stream)
    except OSError as error:
        logger.warning("a control request was not answered: %s", error)
    except Exception:
        logger.exception("a control request failed in an unexpected way")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _listen(path: Path) -> trio.SocketListener:
    paths.make_private(path.parent)
    _remove_stale(path)
    bound = trio.socket.from_stdlib_socket(_bind(path))
    return trio.SocketListener(bound)


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(16)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise SetupError(f"cannot listen at {path}: {error.strerror or error}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket file of a daemon that was killed. Raises SetupError if one still
    answers."""
    if not path.is_socket():
        return
    try:
        open_wait(path, timeout=1.0).close()
    except DaemonNotRunning:
        path.unlink(missing_ok=True)
    except SetupError as error:
        raise SetupError(f"{path} is held by a daemon that does not answer: end it") from error
    else:
        raise SetupError(f"another hpcfs daemon already answers at {path}")


async def _answer(
    status: Callable[[], Awaitable[MountStatus]],
    work: Work | None,
    log_in: LogIn | None,
    stream: trio.SocketStream,
) -> None:
    async with stream:
        if _peer_uid(stream) not in (0, os.getuid()):
            logger.warning("refused a control request by user %d", _peer_uid(stream))
            return
        request: ControlRequest | None = None
        with trio.move_on_after(REQUEST_SECONDS), suppress(trio.BrokenResourceError):
            line = await _read_line(stream)
            if line is None:
                return
            request = _parse(line)
            if request is None or request.command in ("status", "wait"):
                await _send(stream, await _reply(request, status))
        if request is None or request.command == "status":
            return
        if request.command == "wait":
            await _hold(stream)
        elif request.command == "login" and log_in is not None:
            await _log_in(stream, request, log_in)
        elif work is None:
            await _send(stream, ControlReply(error="this daemon can only tell its status"))
        else:
            await _work(stream, request, work)


async def _send(stream: trio.SocketStream, reply: ControlReply) -> None:
    with suppress(trio.BrokenResourceError):
        await stream.send_all(msgspec.json.encode(reply) + b"\n")


class _ProgressSender:
    """Sends progress lines: not too many, and the last one again where nothing new happens."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._lock = trio.Lock()
        self._last = WorkProgress(0, 0)
        self._sent_at = trio.current_time() - STEP_INTERVAL

    async def report(
        self, done: int, total: int, files_done: int = 0, files_total: int = 0, reason: str = "", /
    ) -> None:
        """Report progress, unless the last line was sent just now."""
        self._last = WorkProgress(done, total, files_done, files_total, reason)
        if trio.current_time() - self._sent_at >= STEP_INTERVAL:
            await self.send(ControlReply(step=self._last))

    async def repeat_forever(self) -> None:
        """Repeat the last line when nothing was sent for HEARTBEAT_SECONDS."""
        while True:
            await trio.sleep_until(self._sent_at + HEARTBEAT_SECONDS)
            if trio.current_time() - self._sent_at >= HEARTBEAT_SECONDS:
                await self.send(ControlReply(step=self._last))

    async def send(self, reply: ControlReply) -> None:
        """Send one line."""
        async with self._lock:
            self._sent_at = trio.current_time()
            await _send(self._stream, reply)


async def _work(stream: trio.SocketStream, request: ControlRequest, work: Work) -> None:
    """Do the work until it is done, or the client has left."""
    sender = _ProgressSender(stream)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_gone, stream, nursery.cancel_scope)
        nursery.start_soon(sender.repeat_forever)
        try:
            reply = await work(request, sender.report)
        except SetupError as refused:
            reply = ControlReply(error=str(refused))
        except Exception:  # a user's request must not end the mount
            logger.exception("%s failed in an unexpected way", request.command)
            reply = ControlReply(error="it failed in an unexpected way; the mount's log says more")
        await sender.send(reply)
        nursery.cancel_scope.cancel()


async def _log_in(stream: trio.SocketStream, request: ControlRequest, log_in: LogIn) -> None:
    """Log in until that is done, or the client has left. Its lines are answers to questions."""
    outbox, answers = trio.open_memory_channel[str | None](0)

    async def ask(text: str, echo: bool) -> str | None:
        await _send(stream, ControlReply(question=LoginQuestion(text, echo)))
        try:
            return await answers.receive()
        except trio.EndOfChannel:
            return None

    async def read_answers(scope: trio.CancelScope) -> None:
        async with outbox:
            with suppress(trio.BrokenResourceError, msgspec.MsgspecError, RecursionError):
                while (line := await _read_line(stream)) is not None:
                    answer = msgspec.json.decode(line, type=LoginAnswer).text
                    await outbox.send(None if answer is None else answer.value)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_answers, nursery.cancel_scope)
        try:
            reply = await log_in(request, ask)
        except Exception:  # a user's request must not end the mount
            logger.exception("a login failed in an unexpected way")
            reply = ControlReply(error="it failed in an unexpected way; the mount's log says more")
        await _send(stream, reply)
        nursery.cancel_scope.cancel()


async def _cancel_when_gone(stream: trio.SocketStream, scope: trio.CancelScope) -> None:
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(MAX_REQUEST_BYTES):
            pass
    scope.cancel()


def _parse(line: bytes) -> ControlRequest | None:
    try:
        return msgspec.json.decode(line, type=ControlRequest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


async def _reply(
    request: ControlRequest | None, status: Callable[[], Awaitable[MountStatus]]
) -> ControlReply:
    if request is None:
        return ControlReply(error='a request is one line of JSON, such as {"command": "status"}')
    if request.command == "wait":
        return ControlReply()
    try:
        return ControlReply(status=await status())
    except Exception:  # a status that can't be computed must not end the mount
        logger.exception("could not put the status together")
        return ControlReply(error="it could not put its status together; its log says why")


async def _read_line(stream: trio.SocketStream) -> bytes | None:
    """Read one line; None where the client ends first, or sends more than any request needs."""
    received = bytearray()
    while b"\n" not in received:
        chunk = await stream.receive_some(MAX_REQUEST_BYTES)
        if not chunk or len(received) > MAX_REQUEST_BYTES:
            return None
        received += chunk
    return bytes(received.partition(b"\n")[0])


async def _hold(stream: trio.SocketStream) -> None:
    """Wait until the client leaves. If we are cancelled first, the duplicate descriptor stays open:
    see `_held_until_exit`."""
    duplicate = os.dup(stream.socket.fileno())
    _held_until_exit.add(duplicate)
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some(MAX_REQUEST_BYTES):
            pass
    _held_until_exit.discard(duplicate)
    os.close(duplicate)


def _peer_uid(stream: trio.SocketStream) -> int:
    return ownership.peer_uid(stream.socket)
