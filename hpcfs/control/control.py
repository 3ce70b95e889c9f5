"""The daemon's control socket: its messages, and the client side.

Each mount has a Unix socket in a directory that only the user can enter. A request is one line of
JSON, such as `{"command": "status"}`; the answer is one line too. After "wait" the connection stays
open until the daemon has ended, so that end of file means that it is gone: no pid that may be
reused, no polling. Long work, on the cache or on files that are not uploaded, is answered by a line
for each step and one for its outcome; a client cancels it by closing its end. The answering side is
server.py: a client must not pay for an import of trio.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from hpcfs.model.errors import SetupError
from hpcfs.model.sites import Secret
from hpcfs.system import ownership

MAX_REQUEST_BYTES = 16 * 1024
"""Room for two paths of 4095 bytes each, which base64 makes a third longer."""
MAX_REPLY_BYTES = 16 * 1024 * 1024
ANSWER_SECONDS = 5.0
STEP_SECONDS = 120.0
"""Much longer than server.HEARTBEAT_SECONDS, after which the daemon repeats its last step."""
MAX_PENDING = 1000
"""Files named in one answer. Those that failed come first; the rest is only counted."""


class DaemonNotRunning(SetupError):
    """No daemon listens on the socket."""


class DaemonNotAnswering(SetupError):
    """A daemon is there, but does not answer, or its answer is invalid."""


class OutOfTime(SetupError):
    """The client's time limit has passed. The work continues."""


class NamespaceStatus(msgspec.Struct, frozen=True):
    """The state of one namespace. `reason` says why it failed, or what is special about its
    connection. `url` holds no secret. `write` is "through" or "back" mode. With `needs_login`, it
    failed because the login was refused: `hpcfs login` tries again."""

    name: str
    kind: str
    url: str
    state: Literal["idle", "connecting", "connected", "failed"]
    reason: str = ""
    read_only: bool = False
    write: str = "through"
    needs_login: bool = False


class SiteStatus(msgspec.Struct, frozen=True):
    """The open resources of one login, which serves these `namespaces`: connections (for SSH those
    to jump hosts too), SFTP channels on them, and requests in flight."""

    namespaces: list[str]
    kind: str
    connections: int
    channels: int
    requests: int


PendingState = Literal["writing", "waiting", "uploading", "failed", "kept"]
"""writing: open and dirty; waiting: queued; failed: will be retried; kept: is safe in a local file,
and is retried only on the user's command."""


class PendingFile(msgspec.Struct, frozen=True):
    """A file that the remote has not confirmed.

    `path` is relative to its namespace, and for display only, since invalid UTF-8 in it is
    replaced. `size`, and `left` (still to be sent), are bytes; `since` is in seconds since the
    epoch. `reason` says why it failed or is kept; `data` is the local file with the bytes of a kept
    one. `id` is its name in the journal.
    """

    namespace: str
    path: str
    size: int
    left: int
    state: PendingState
    since: float
    id: str
    reason: str = ""
    data: str = ""

    @property
    def is_stuck(self) -> bool:
        """Whether the remote refused it, or was out of reach."""
        return self.state in ("failed", "kept")


class PendingList(msgspec.Struct, frozen=True):
    """The files below a path that are not uploaded: all are counted, at most MAX_PENDING are named.

    Those that failed come first. `size`, and `left` (still to be sent), are bytes; `states` has the
    number of files in each state; `time` is that of the answer, in seconds since the epoch.
    """

    files: list[PendingFile] = []
    count: int = 0
    size: int = 0
    left: int = 0
    states: dict[PendingState, int] = {}
    time: float = 0.0

    @property
    def stuck(self) -> int:
        """The number of files that failed or are kept."""
        return self.states.get("failed", 0) + self.states.get("kept", 0)


class MountStatus(msgspec.Struct, frozen=True):
    """The answer to "status". Sizes are bytes, times are seconds since the epoch.

    `memory` is the daemon's resident set. `pending` holds the first of `pending_files`, ordered as
    in PendingList; `pending_bytes` are left to send of all. `uploaded_bytes` were sent since the
    mount began; `upload_rate` is the present rate in bytes per second. `root_namespace` is the
    namespace that is the root of the mount itself, if there is one. `sites` omits those that are
    too busy to answer.
    """

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
    pending: list[PendingFile] = []
    pending_files: int = 0
    pending_bytes: int = 0
    pending_states: dict[PendingState, int] = {}
    uploaded_bytes: int = 0
    upload_rate: float = 0.0
    memory: int = 0
    notices: list[str] = []
    """Events that the user should know of: the last conflicts."""
    resumed_files: int = 0
    """Files that an earlier mount had not uploaded and this one resumed."""
    root_namespace: str | None = None
    sites: list[SiteStatus] = []
    troubles: list[str] = []
    """What went wrong in the daemon itself, such as a damaged file of the cache directory."""


class CacheFolder(msgspec.Struct, frozen=True):
    """The cached files of one remote folder; `name` is its namespace, if it has one."""

    name: str
    origin: str
    files: int
    bytes: int
    pinned_files: int
    pinned_bytes: int


class CacheStatus(msgspec.Struct, frozen=True):
    """The answer to "cache". Sizes are bytes: `limit` is `cache_size`, `free` is the disk's
    free space, `min_free` must stay free. The limits of a cache that is not mounted are
    unknown: None."""

    directory: str
    mountpoint: str
    mounted: bool
    used: int
    free: int
    folders: list[CacheFolder]
    pins: list[str]
    limit: int | None = None
    min_free: int | None = None


class WorkProgress(msgspec.Struct, frozen=True):
    """The progress of long work, in bytes and, where it counts them, in files. `reason` says why it
    does not proceed now."""

    done: int
    total: int
    files_done: int = 0
    files_total: int = 0
    reason: str = ""


class Outcome(msgspec.Struct, frozen=True):
    """The result of long work; `damaged_bytes` of `damaged_files` were dropped."""

    files: int = 0
    bytes: int = 0
    damaged_files: int = 0
    damaged_bytes: int = 0


class LoginQuestion(msgspec.Struct, frozen=True):
    """A question of a login, for whoever runs `hpcfs login`. `echo` is false for secrets."""

    text: str
    echo: bool


class LoginAnswer(msgspec.Struct, frozen=True):
    """The line that answers a question; None where nobody answers it."""

    text: Secret | None


WRITE_COMMANDS = ("pending", "sync", "retry", "discard", "recover")
"""Commands about files that are not uploaded (daemon/write_commands.py); the others are about the
cache."""


class ControlRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line from the client.

    `path` is below the mount point, without slashes at its ends; b"" is the mount itself. `to` is
    the local directory for "recover", `name` the namespace for "login". "discard" affects only
    files that were pending `before` that time. For "sync" a site may be out of reach for `patience`
    seconds. "let_go" fails the calls of programs that wait for a remote that does not answer; its
    outcome counts them as files.
    """

    command: Literal[
        "status", "wait",
        "cache", "clear", "verify", "warm", "pin", "unpin",
        "pending", "sync", "retry", "discard", "recover",
        "login", "let_go",
    ]  # fmt: skip
    path: bytes = b""
    pinned: bool = False
    to: bytes = b""
    before: float = 0.0
    patience: float = 30.0
    name: str = ""


class ControlReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line from the daemon. Exactly one field is set, but none in the answer to "wait", and
    none where a login is done."""

    status: MountStatus | None = None
    error: str | None = None
    cache: CacheStatus | None = None
    step: WorkProgress | None = None
    outcome: Outcome | None = None
    pending: PendingList | None = None
    question: LoginQuestion | None = None


class DaemonRefused(SetupError):
    """The daemon can't do what was requested, and says why."""


def query_status(path: Path, timeout: float = ANSWER_SECONDS) -> MountStatus:
    """Ask the daemon for its status. Raises DaemonNotRunning or DaemonNotAnswering."""
    with _connect(path, timeout) as connection:
        reply = _ask(connection, ControlRequest("status"), timeout)
    if reply.status is None:
        raise DaemonNotAnswering(f"the daemon refused to answer: {reply.error}")
    return reply.status


def query_cache(path: Path, timeout: float = STEP_SECONDS) -> CacheStatus:
    """Ask the daemon what its cache holds.

    Raises DaemonNotRunning, DaemonNotAnswering or DaemonRefused.
    """
    with _connect(path, ANSWER_SECONDS) as connection:
        reply = _ask(connection, ControlRequest("cache"), timeout)
    if reply.cache is None:
        raise DaemonRefused(reply.error or "the daemon gave no answer")
    return reply.cache


def query_pending(path: Path, below: bytes, timeout: float = STEP_SECONDS) -> PendingList:
    """Return the files at and below that path of the mount that are not uploaded yet.

    Raises DaemonNotRunning, DaemonNotAnswering or DaemonRefused.
    """
    with _connect(path, ANSWER_SECONDS) as connection:
        reply = _ask(connection, ControlRequest("pending", below), timeout)
    if reply.pending is None:
        raise DaemonRefused(reply.error or "the daemon gave no answer")
    return reply.pending


def work(
    path: Path,
    request: ControlRequest,
    on_step: Callable[[WorkProgress], None],
    seconds: float | None = None,
) -> Outcome:
    """Send a request for long work, call `on_step` for each step, return when the work is done.

    Raises DaemonNotRunning, DaemonNotAnswering or DaemonRefused, and OutOfTime after `seconds`.
    """
    end = None if seconds is None else time.monotonic() + seconds
    with _connect(path, ANSWER_SECONDS) as connection:
        reply = _ask(connection, request, STEP_SECONDS, end)
        while reply.step is not None:
            on_step(reply.step)
            reply = _listen(connection, STEP_SECONDS, end)
    if reply.outcome is None:
        raise DaemonRefused(reply.error or "the daemon gave no answer")
    return reply.outcome


def log_in(path: Path, namespace: str, ask: Callable[[str, bool], str | None]) -> None:
    """Have the daemon log a namespace in anew, and put its questions to `ask`: text and echo.

    Raises DaemonNotRunning, DaemonNotAnswering, or DaemonRefused where the login failed.
    """
    with _connect(path, ANSWER_SECONDS) as connection:
        reply = _ask(connection, ControlRequest("login", name=namespace), STEP_SECONDS)
        while (question := reply.question) is not None:
            text = ask(question.text, question.echo)
            answer = LoginAnswer(None if text is None else Secret(text))
            reply = _ask(connection, answer, STEP_SECONDS)
    if reply.error is not None:
        raise DaemonRefused(reply.error)


def open_wait(path: Path, timeout: float = ANSWER_SECONDS) -> socket.socket:
    """Return a connection for `wait_until_gone`; call it while the daemon still listens.

    Raises DaemonNotRunning or DaemonNotAnswering.
    """
    connection = _connect(path, timeout)
    try:
        reply = _ask(connection, ControlRequest("wait"), timeout)
    except BaseException:
        connection.close()
        raise
    if reply.error is not None:
        connection.close()
        raise DaemonNotAnswering(f"the daemon refused to answer: {reply.error}")
    return connection


def wait_until_gone(connection: socket.socket, timeout: float | None) -> bool:
    """Return whether the daemon ended within `timeout` seconds; None waits without a limit."""
    connection.settimeout(timeout)
    try:
        return not connection.recv(1)
    except (TimeoutError, BlockingIOError):  # the latter if `timeout` is 0
        return False
    except ConnectionResetError:
        return True


def _connect(path: Path, timeout: float) -> socket.socket:
    try:
        return ownership.connect(path, timeout)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            raise DaemonNotRunning(f"no hpcfs daemon listens at {path}") from error
        reason = error.strerror or "it does not answer"
        raise DaemonNotAnswering(f"the daemon at {path} can't be asked: {reason}") from error


def _ask(
    connection: socket.socket,
    request: ControlRequest | LoginAnswer,
    timeout: float,
    end: float | None = None,
) -> ControlReply:
    try:
        connection.sendall(msgspec.json.encode(request) + b"\n")
    except OSError as error:
        raise DaemonNotAnswering(f"the daemon broke off: {error.strerror}") from error
    return _listen(connection, timeout, end)


def _listen(connection: socket.socket, timeout: float, end: float | None = None) -> ControlReply:
    """Read one answer. Raises DaemonNotAnswering after `timeout` seconds, and OutOfTime at `end`
    (time.monotonic())."""
    deadline = time.monotonic() + timeout
    try:
        line = _read_line(connection, deadline if end is None else min(deadline, end))
        return msgspec.json.decode(line, type=ControlReply)
    except TimeoutError:
        if end is not None and end <= deadline:
            raise OutOfTime("there was not enough time") from None
        raise DaemonNotAnswering(f"the daemon did not answer within {timeout:g} s") from None
    except OSError as error:
        raise DaemonNotAnswering(f"the daemon broke off: {error.strerror}") from error
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DaemonNotAnswering(
            f"the daemon's answer makes no sense ({error}): was hpcfs upgraded since the mount?"
        ) from error


def _read_line(connection: socket.socket, deadline: float) -> bytes:
    """Read up to the line's end and no further, since more lines may have arrived."""
    received = bytearray()
    while not received.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.settimeout(left)
        waiting = connection.recv(65536, socket.MSG_PEEK)
        if not waiting:
            raise DaemonNotAnswering("the daemon ended before it answered")
        received += connection.recv(waiting.find(b"\n") + 1 or len(waiting))
        if len(received) > MAX_REPLY_BYTES:
            raise DaemonNotAnswering("the daemon's answer is too long to be one")
    return bytes(received)
