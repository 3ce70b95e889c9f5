"""The daemon's control socket: what is said on it, and the side that asks.

A Unix socket for each mount, in a directory that only the user can enter. A request is one line of
JSON, such as `{"command": "status"}`; the answer is one line too. After "wait" the connection stays
open until the daemon has ended, so that end of file means gone: no pid to reuse, no polling. Work
on the cache is answered by a line for each step, and one for its outcome; a client that closes its
end cancels it. The answering side is server.py: asking must not cost an import of trio.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from hpcfs.errors import SetupError

MAX_REQUEST_BYTES = 16 * 1024
"""A path has 4095 bytes, a third more in base64."""
MAX_REPLY_BYTES = 16 * 1024 * 1024
ANSWER_SECONDS = 5.0
STEP_SECONDS = 120.0
"""Longer than a remote may take for an answer without the request being given up."""


class NotRunning(SetupError):
    """No daemon listens there."""


class NotAnswering(SetupError):
    """A daemon is there, but does not answer, or answers nonsense."""


class NamespaceStatus(msgspec.Struct, frozen=True):
    """`reason` says why a namespace failed, else it is empty. `url` holds no secret."""

    name: str
    kind: str
    url: str
    state: Literal["idle", "connecting", "connected", "failed"]
    reason: str = ""
    read_only: bool = False


class KeptFile(msgspec.Struct, frozen=True):
    """Bytes that could not be uploaded: they are safe in the local file `data`."""

    namespace: str
    path: str
    size: int
    reason: str
    data: str
    since: float


class MountStatus(msgspec.Struct, frozen=True):
    """Sizes are bytes, times are seconds since the epoch. `memory` is the daemon's resident set."""

    mountpoint: str
    pid: int
    version: str
    started: float
    log_file: str
    cache_dir: str
    cache_used: int
    cache_size: int
    open_files: int
    dirty_files: int
    namespaces: list[NamespaceStatus]
    kept: list[KeptFile]
    memory: int = 0


class CacheFolder(msgspec.Struct, frozen=True):
    """What the cache holds of one remote folder; `name` is its namespace, where there is one."""

    name: str
    origin: str
    files: int
    bytes: int
    pinned_files: int
    pinned_bytes: int


class CacheStatus(msgspec.Struct, frozen=True):
    """Sizes in bytes; `limit` is `cache_size`, `free` what the disk has left, `min_free` what is to
    stay so. Of a cache that is not mounted now nobody knows the limits: they are None."""

    directory: str
    mountpoint: str
    mounted: bool
    used: int
    free: int
    folders: list[CacheFolder]
    pins: list[str]
    limit: int | None = None
    min_free: int | None = None


class Step(msgspec.Struct, frozen=True):
    """How far the work has come, in bytes."""

    done: int
    total: int


class Outcome(msgspec.Struct, frozen=True):
    """What the work came to; `damaged_bytes` of `damaged_files` were dropped."""

    files: int = 0
    bytes: int = 0
    damaged_files: int = 0
    damaged_bytes: int = 0


WORK = ("clear", "verify", "warm", "pin", "unpin")


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """`path` is below the mount point, without slashes at its ends; b"" is the mount itself."""

    command: Literal["status", "wait", "cache", "clear", "verify", "warm", "pin", "unpin"]
    path: bytes = b""
    pinned: bool = False


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Exactly one of them, but none for "wait"."""

    status: MountStatus | None = None
    error: str | None = None
    cache: CacheStatus | None = None
    step: Step | None = None
    outcome: Outcome | None = None


class Refused(SetupError):
    """The daemon can't do what it was asked for, and says why."""


def query_status(path: Path, timeout: float = ANSWER_SECONDS) -> MountStatus:
    """Raises NotRunning or NotAnswering."""
    with _connect(path, timeout) as connection:
        reply = _ask(connection, Request("status"), timeout)
    if reply.status is None:
        raise NotAnswering(f"the daemon refused to answer: {reply.error}")
    return reply.status


def query_cache(path: Path, timeout: float = STEP_SECONDS) -> CacheStatus:
    """Raises NotRunning, NotAnswering or Refused."""
    with _connect(path, ANSWER_SECONDS) as connection:
        reply = _ask(connection, Request("cache"), timeout)
    if reply.cache is None:
        raise Refused(reply.error or "the daemon gave no answer")
    return reply.cache


def work(path: Path, request: Request, on_step: Callable[[Step], None]) -> Outcome:
    """Returns when it is done. Raises NotRunning, NotAnswering or Refused."""
    with _connect(path, ANSWER_SECONDS) as connection:
        reply = _ask(connection, request, STEP_SECONDS)
        while reply.step is not None:
            on_step(reply.step)
            reply = _listen(connection, STEP_SECONDS)
    if reply.outcome is None:
        raise Refused(reply.error or "the daemon gave no answer")
    return reply.outcome


def open_wait(path: Path, timeout: float = ANSWER_SECONDS) -> socket.socket:
    """A connection for `wait_until_gone`, made while the daemon still listens.

    Raises NotRunning or NotAnswering.
    """
    connection = _connect(path, timeout)
    try:
        reply = _ask(connection, Request("wait"), timeout)
    except BaseException:
        connection.close()
        raise
    if reply.error is not None:
        connection.close()
        raise NotAnswering(f"the daemon refused to answer: {reply.error}")
    return connection


def wait_until_gone(connection: socket.socket, timeout: float | None) -> bool:
    """Whether the daemon ended within that time; None waits for as long as it takes."""
    connection.settimeout(timeout)
    try:
        return not connection.recv(1)
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def _connect(path: Path, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            raise NotRunning(f"no hpcfs daemon listens at {path}") from error
        reason = error.strerror or "it does not answer"
        raise NotAnswering(f"the daemon at {path} can't be asked: {reason}") from error
    return connection


def _ask(connection: socket.socket, request: Request, timeout: float) -> Reply:
    try:
        connection.sendall(msgspec.json.encode(request) + b"\n")
    except OSError as error:
        raise NotAnswering(f"the daemon broke off: {error.strerror}") from error
    return _listen(connection, timeout)


def _listen(connection: socket.socket, timeout: float) -> Reply:
    try:
        line = _read_line(connection, time.monotonic() + timeout)
        return msgspec.json.decode(line, type=Reply)
    except TimeoutError:
        raise NotAnswering(f"the daemon did not answer within {timeout:g} s") from None
    except OSError as error:
        raise NotAnswering(f"the daemon broke off: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise NotAnswering(
            f"the daemon's answer makes no sense ({error}): was hpcfs upgraded since the mount?"
        ) from error


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    """Up to the line's end and no further: more lines may have arrived."""
    received = bytearray()
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        waiting = connection.recv(65536, socket.MSG_PEEK)
        if not waiting:
            raise NotAnswering("the daemon ended before it answered")
        received += connection.recv(waiting.find(b"\n") + 1 or len(waiting))
        if len(received) > MAX_REPLY_BYTES:
            raise NotAnswering("the daemon's answer is too long to be one")
    return bytes(received)
