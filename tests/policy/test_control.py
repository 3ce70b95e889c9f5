"""The control socket: answers its user whatever else is sent, and tells of the daemon's end."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import given, settings, strategies as st

from hpcfs.control import control, server as control_server
from hpcfs.control.control import (
    ControlReply,
    ControlRequest,
    MountStatus,
    NamespaceStatus,
    Outcome,
    PendingFile,
    PendingList,
    WorkProgress,
)
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import Secret

STATUS = MountStatus(
    mountpoint="/m",
    pid=7,
    version="0",
    started=1.5,
    log_file="/l",
    cache_dir="/c",
    cache_used=1,
    cache_size=2,
    open_files=3,
    dirty_files=4,
    namespaces=[NamespaceStatus("home", "sftp", "sftp://h/~", "failed", "no route", True, "back")],
    pending=[PendingFile("home", "a/b", 5, 4, "kept", 2.5, "x", "quota", "/c/x")],
    pending_files=7,
    pending_bytes=8,
    pending_states={"kept": 1, "waiting": 6},
    uploaded_bytes=9,
    upload_rate=1.5,
    memory=6,
    root_namespace="home",
)


@contextmanager
def serving(
    path: Path,
    status: Callable[[], MountStatus] = lambda: STATUS,
    work: control_server.Work | None = None,
    log_in: control_server.LogIn | None = None,
) -> Iterator[None]:
    """The server in a thread of its own, listening before this returns."""
    ready = threading.Event()
    stop: list[Callable[[], None]] = []

    async def told() -> MountStatus:
        return status()

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(control_server.serve, path, told, work, log_in)
            token = trio.lowlevel.current_trio_token()
            stop.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
            ready.set()

    thread = threading.Thread(target=trio.run, args=[run])
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        for end in stop:
            end()
        thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "m.sock"


def talk(path: Path, data: bytes) -> bytes:
    """What the server says until it closes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(str(path))
        received = b""
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while chunk := client.recv(65536):
                received += chunk
        except (ConnectionResetError, BrokenPipeError):  # it closed before it read all of that
            return received
        return received


def test_a_status_arrives_as_it_was(path: Path) -> None:
    with serving(path):
        assert control.query_status(path) == STATUS
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"", b"\n", b"hello\n", b"\xff\xfe\n", b'{"command": "explode"}\n', b"[]\n"),
        *(b"{" * 3000, b"x" * 1_000_000),
        *(b'{"command": "status", "more": 1}\n', b'{"command": "status"}'),
    ],
)
def test_garbage_harms_nobody(path: Path, garbage: bytes) -> None:
    with serving(path):
        answer = talk(path, garbage)
        assert answer == b"" or "error" in json.loads(answer)
        assert control.query_status(path) == STATUS


@pytest.mark.slow
def test_mutated_requests_harm_nobody(path: Path) -> None:
    """HPCFS_EXAMPLES sets how many are tried."""
    lines = st.sampled_from(
        [
            b'{"command": "status"}\n',
            b'{"command": "sync", "path": "bnMvYQ==", "patience": 3.5}\n',
            b'{"command": "discard", "path": "", "before": 1e9}\n{"command": "wait"}\n',
        ]
    )
    cuts = st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4
    )

    @settings(max_examples=int(os.environ.get("HPCFS_EXAMPLES", "200")), deadline=None)
    @given(lines, cuts)
    def mutate(line: bytes, changes: list[tuple[float, int, bytes]]) -> None:
        for part, length, instead in changes:
            at = int(part * len(line))
            line = line[:at] + instead + line[at + length :]
        for answer in talk(path, line).splitlines():
            assert msgspec.json.decode(answer, type=ControlReply)

    with serving(path, work=count_to_three):
        mutate()
        assert control.query_status(path) == STATUS


def test_a_silent_client_delays_nobody(path: Path) -> None:
    with serving(path), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(path))
        silent.sendall(b'{"comm')
        assert control.query_status(path) == STATUS


def test_a_status_that_fails_is_told_and_logged_but_ends_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> MountStatus:
        raise ZeroDivisionError

    with caplog.at_level(logging.ERROR), serving(path, broken):
        for _ in range(2):
            with pytest.raises(control.DaemonNotAnswering, match="its log says why"):
                control.query_status(path)
    assert "ZeroDivisionError" in caplog.text


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with pytest.raises(control.DaemonNotRunning):
        control.query_status(path)
    with serving(path):
        with pytest.raises(SetupError, match="another hpcfs daemon"):
            trio.run(control_server.serve, path, lambda: STATUS)
        assert control.query_status(path) == STATUS


def test_no_daemon_and_a_hung_one_are_told_apart(path: Path) -> None:
    with pytest.raises(control.DaemonNotRunning):
        control.query_status(path)
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as hung:
        hung.bind(str(path))
        hung.listen()
        with pytest.raises(control.DaemonNotAnswering, match="within"):
            control.query_status(path, timeout=0.1)


def test_nonsense_of_a_daemon_is_an_error(path: Path) -> None:
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as odd:
        odd.bind(str(path))
        odd.listen()

        def answer(data: bytes) -> None:
            connection, _ = odd.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(data)

        deep = b'{"x":' + b"[" * 100_000 + b"\n"
        for data, said in (
            (b"[1]\n", "makes no sense"),
            (deep, "makes no sense"),
            (b"", "ended before"),
            (b"{}", "ended"),
        ):
            thread = threading.Thread(target=answer, args=[data])
            thread.start()
            with pytest.raises(control.DaemonNotAnswering, match=said):
                control.query_status(path)
            thread.join()


def test_other_users_are_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control_server, "_peer_uid", lambda stream: 12345)
    with caplog.at_level(logging.WARNING), serving(path), pytest.raises(control.DaemonNotAnswering):
        control.query_status(path)
    assert "12345" in caplog.text


# --- work on the cache --------------------------------------------------------------------------


async def count_to_three(
    request: ControlRequest, tell: control_server.ReportProgress
) -> ControlReply:
    if request.command == "cache":
        raise SetupError(f"not {request.path!r}")
    if request.command == "clear":
        raise ZeroDivisionError
    if request.command == "warm":
        await trio.sleep_forever()
    for done in range(3):
        await tell(done, 3)
    return ControlReply(outcome=Outcome(3, len(request.path)))


def test_work_tells_of_its_steps_and_what_came_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "STEP_INTERVAL", 0.0)
    odd = "häuser\n".encode("latin-1") * 500
    with serving(path, work=count_to_three):
        steps: list[WorkProgress] = []
        outcome = control.work(path, ControlRequest("verify", odd), steps.append)
        assert outcome == Outcome(3, len(odd))
        assert steps == [WorkProgress(0, 3), WorkProgress(1, 3), WorkProgress(2, 3)]
        assert control.query_status(path) == STATUS


def test_work_that_cannot_be_done_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), serving(path, work=count_to_three):
        with pytest.raises(control.DaemonRefused, match="not b''"):
            control.query_cache(path)
        with pytest.raises(control.DaemonRefused, match="log says more"):
            control.work(path, ControlRequest("clear"), print)
        assert control.query_status(path) == STATUS
    assert "ZeroDivisionError" in caplog.text
    with serving(path), pytest.raises(control.DaemonRefused, match="only tell its status"):
        control.query_cache(path)


def test_work_ends_when_its_client_leaves(path: Path) -> None:
    """And delays nobody until then."""
    ended = threading.Event()

    async def endless(request: ControlRequest, tell: control_server.ReportProgress) -> ControlReply:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    with serving(path, work=endless):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            client.sendall(b'{"command": "warm"}\n')
            assert control.query_status(path) == STATUS
            assert not ended.is_set()
        assert ended.wait(10)


async def ask_twice(request: ControlRequest, ask: control_server.AskClient) -> ControlReply:
    answers = [await ask("Password: ", False), await ask("Code: ", True)]
    if answers == ["secret", None]:
        return ControlReply()
    return ControlReply(error=f"{request.name} got {answers}")


def test_the_questions_of_a_login_travel_to_its_client(path: Path) -> None:
    asked = []

    def ask(text: str, echo: bool) -> str | None:
        asked.append((text, echo))
        return None if echo else "secret"

    with serving(path, log_in=ask_twice):
        control.log_in(path, "home", ask)
        assert asked == [("Password: ", False), ("Code: ", True)]
        with pytest.raises(control.DaemonRefused, match=r"home got \['x', 'x'\]"):
            control.log_in(path, "home", lambda text, echo: "x")
    assert "secret" not in repr(control.LoginAnswer(Secret("secret")))


@pytest.mark.parametrize("last_words", [b"", b"no answer\n"])
def test_a_login_ends_when_its_client_leaves(path: Path, last_words: bytes) -> None:
    ended = threading.Event()

    async def log_in(request: ControlRequest, ask: control_server.AskClient) -> ControlReply:
        try:
            return await ask_twice(request, ask)
        finally:
            ended.set()

    with serving(path, log_in=log_in):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(str(path))
            client.sendall(b'{"command": "login", "name": "home"}\n')
            assert b"Password" in client.recv(65536)
            assert control.query_status(path) == STATUS, "it delays nobody"
            client.sendall(last_words)
        assert ended.wait(10)


def test_the_longest_paths_fit_into_a_request(path: Path) -> None:
    odd = b"\xff" * 4095
    seen: list[ControlRequest] = []

    async def note(request: ControlRequest, tell: control_server.ReportProgress) -> ControlReply:
        seen.append(request)
        return ControlReply(pending=PendingList(time=1.0))

    asked = ControlRequest("recover", odd, to=odd, before=2.5)
    with serving(path, work=note):
        with pytest.raises(control.DaemonRefused):
            control.work(path, asked, print)
        assert control.query_pending(path, odd) == PendingList(time=1.0)
    assert seen == [asked, ControlRequest("pending", odd)]


def test_work_counts_files_and_repeats_itself_while_nothing_happens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client would take a slow upload for a daemon that hangs."""
    monkeypatch.setattr(control_server, "HEARTBEAT_SECONDS", 0.01)
    steps: list[WorkProgress] = []
    enough = threading.Event()

    async def slow(request: ControlRequest, tell: control_server.ReportProgress) -> ControlReply:
        await tell(1, 2, 3, 4)
        await trio.to_thread.run_sync(enough.wait, 10)
        return ControlReply(outcome=Outcome(4, 2))

    def note(step: WorkProgress) -> None:
        steps.append(step)
        if len(steps) == 3:
            enough.set()

    with serving(path, work=slow):
        assert control.work(path, ControlRequest("sync"), note) == Outcome(4, 2)
    assert set(steps) == {WorkProgress(1, 2, 3, 4)}


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_a_client_waits_no_longer_than_it_was_told_to(path: Path, seconds: float) -> None:
    """Even while the daemon tells of steps all the time."""

    async def endless(request: ControlRequest, tell: control_server.ReportProgress) -> ControlReply:
        while True:
            await tell(1, 2)
            await trio.sleep(0.01)

    with serving(path, work=endless):
        with pytest.raises(control.OutOfTime):
            control.work(path, ControlRequest("sync"), lambda _: None, seconds)
        assert control.query_status(path) == STATUS


DAEMON = """
import sys, trio
from pathlib import Path
from hpcfs.control import server as control_server
async def main():
    async with trio.open_nursery() as nursery:
        await nursery.start(control_server.serve, Path(sys.argv[1]), lambda: None)
        print("ready", flush=True)
        await trio.to_thread.run_sync(sys.stdin.readline)
        nursery.cancel_scope.cancel()
trio.run(main)
print("served", flush=True)
sys.stdin.readline()
"""


@contextmanager
def daemon(path: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_waiting_ends_with_the_process_not_with_its_server(path: Path) -> None:
    with daemon(path) as process, control.open_wait(path) as connection:
        assert process.stdin is not None
        assert process.stdout is not None
        assert not control.wait_until_gone(connection, 0.05)
        process.stdin.write("stop serving\n")
        process.stdin.flush()
        assert process.stdout.readline() == "served\n"
        assert not control.wait_until_gone(connection, 0.05)
        process.stdin.write("exit\n")
        process.stdin.flush()
        assert control.wait_until_gone(connection, 10)


@pytest.mark.slow
def test_waiting_ends_when_the_daemon_is_killed(path: Path) -> None:
    with daemon(path) as process, control.open_wait(path) as connection:
        os.kill(process.pid, signal.SIGKILL)
        assert control.wait_until_gone(connection, 10)
    with pytest.raises(control.DaemonNotRunning):
        control.open_wait(path)
