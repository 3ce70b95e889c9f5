"""The status of a running tunnel, and the client side of its control socket.

A Unix socket that only the user can reach carries one line of JSON each way. After "stop" the
socket stays open until the tunnel has ended. The answering side is control.py: a client must not
pay for an import of asyncio.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from hpcfs.model.errors import SetupError
from hpcfs.system import ownership, paths

ANSWER_SECONDS = 5.0
STOP_SECONDS = 20.0
MAX_LINE_BYTES = 1024 * 1024
_PREFIX = "tunnel-"

TunnelState = Literal["connecting", "up", "lost"]


class MountSeen(msgspec.Struct, frozen=True):
    """A connected mount: `host` is its own name for its machine; `since` is in seconds since the
    epoch."""

    host: str
    since: float


class TunnelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to "status". Times are seconds since the epoch.

    `host` is as the user named it. In `state` "lost" the tunnel waits for `next_try` seconds before
    it tries again, because of `reason`. `places` is where mounts connect; `notes` say which
    forwards sshd refused. `up` and `down` are bytes of files sent to the cluster and received from
    it since the tunnel began; the rates are bytes per second.
    """

    name: str
    host: str
    pid: int
    version: str
    started: float
    state: TunnelState
    since: float
    reason: str = ""
    next_try: float | None = None
    places: list[str] = []
    notes: list[str] = []
    shares: list[str] = []
    mounts: list[MountSeen] = []
    up: int = 0
    down: int = 0
    up_rate: float = 0.0
    down_rate: float = 0.0
    log_file: str = ""


class TunnelReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from the tunnel: either the status or an error."""

    status: TunnelStatus | None = None
    error: str | None = None


class TunnelNotRunning(SetupError):
    """No tunnel of that name runs here."""


def socket_path(name: str) -> Path:
    """Return the path at which a new tunnel of that name listens."""
    return paths.socket_paths(f"{_PREFIX}{name}")[0]


def running() -> list[str]:
    """Return the names of the tunnels that left a socket here; one may have been killed since."""
    found = {
        path.stem.removeprefix(_PREFIX)
        for place in paths.runtime_dirs()
        for path in place.glob(f"{_PREFIX}*.sock")
        if ownership.is_socket(path)
    }
    return sorted(found)


def query(name: str) -> TunnelStatus:
    """Ask a tunnel for its status. Raises TunnelNotRunning, or SetupError where it does not
    answer."""
    with _connect(name) as connection:
        return _ask(connection, name, {"command": "status"})


def stop(name: str) -> None:
    """Stop a tunnel, and return when it has ended and left nothing on the cluster. Raises as
    `query` does."""
    with _connect(name) as connection:
        pid = _ask(connection, name, {"command": "stop"}).pid
        connection.settimeout(STOP_SECONDS)
        try:
            while connection.recv(1):
                pass
        except ConnectionResetError:
            return
        except TimeoutError:
            raise SetupError(
                f"the tunnel {name} (pid {pid}) does not end: end it with 'kill {pid}'"
            ) from None


def _connect(name: str) -> socket.socket:
    for path in paths.socket_paths(f"{_PREFIX}{name}"):
        try:
            return ownership.connect(path, ANSWER_SECONDS)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
                continue
            raise SetupError(f"the tunnel {name} can't be asked: {error.strerror}") from error
    raise TunnelNotRunning(f"no tunnel named {name} runs here")


def _ask(connection: socket.socket, name: str, request: Mapping[str, str]) -> TunnelStatus:
    try:
        connection.sendall(msgspec.json.encode(request) + b"\n")
        reply = msgspec.json.decode(_read_line(connection), type=TunnelReply)
    except TimeoutError:
        raise SetupError(f"the tunnel {name} did not answer within {ANSWER_SECONDS:g} s") from None
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise SetupError(f"the tunnel {name} gave no answer that makes sense: {error}") from error
    if reply.status is None:
        raise SetupError(f"the tunnel {name} refused: {reply.error}")
    return reply.status


def _read_line(connection: socket.socket) -> bytes:
    received = bytearray()
    while not received.endswith(b"\n"):
        chunk = connection.recv(65536)
        if not chunk or len(received) > MAX_LINE_BYTES:
            raise ConnectionError("it ended")
        received += chunk
    return bytes(received)
