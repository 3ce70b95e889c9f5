"""The daemon's control socket: what is said on it, and the side that asks.

A Unix socket for each mount, in a directory that only the user can enter. A request is one line of
JSON, `{"command": "status"}` or `{"command": "wait"}`; the answer is one line too. After "wait" the
connection stays open until the daemon has ended, so that end of file means gone: no pid to reuse,
no polling. The answering side is server.py: asking must not cost an import of trio.
"""

from __future__ import annotations

import errno
import socket
import time
from pathlib import Path
from typing import Literal

import msgspec

from hpcfs.errors import SetupError

MAX_REQUEST_BYTES = 4096
MAX_REPLY_BYTES = 16 * 1024 * 1024
ANSWER_SECONDS = 5.0


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


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: Literal["status", "wait"]


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Exactly one of them for "status"; neither for "wait"."""

    status: MountStatus | None = None
    error: str | None = None


def query_status(path: Path, timeout: float = ANSWER_SECONDS) -> MountStatus:
    """Raises NotRunning or NotAnswering."""
    with _connect(path, timeout) as connection:
        reply = _ask(connection, Request("status"), timeout)
    if reply.status is None:
        raise NotAnswering(f"the daemon refused to answer: {reply.error}")
    return reply.status


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
    received = bytearray()
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        chunk = connection.recv(65536)
        if not chunk:
            raise NotAnswering("the daemon ended before it answered")
        received += chunk
        if len(received) > MAX_REPLY_BYTES:
            raise NotAnswering("the daemon's answer is too long to be one")
    return bytes(received)
