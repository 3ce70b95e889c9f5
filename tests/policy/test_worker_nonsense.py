"""A worker process gone mad: it ends no more than itself, and the next one answers.

In one process, in virtual time. CI takes some thousand changed messages; for a long run:
    HPCFS_FUZZ_MESSAGES=1000000 pytest tests/policy/test_worker_nonsense.py
and a failure is run again with HPCFS_FUZZ_SEED, which it tells.
"""

from __future__ import annotations

import os
import random
import socket
import termios
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Entry
from hpcfs.model.errors import RemoteError, Unreachable
from hpcfs.model.sites import S3Root, S3Site, SiteSpec
from hpcfs.model.usage import DiskUsage, Traffic
from hpcfs.protocol import messages as m
from hpcfs.site.client import SiteClient
from hpcfs.site.worker_process import WorkerProcess, _take_frames

CI_MESSAGES = 2000
MESSAGES = int(os.environ.get("HPCFS_FUZZ_MESSAGES", str(CI_MESSAGES)))
SEED = int(os.environ.get("HPCFS_FUZZ_SEED", "0"))
RUN_MESSAGES = 1000
ENTRY = Entry(b"name", 0o100644, 1234, 10**18, 10**18, 1000, 1000, b"1234:5", ((b"user.a", b"b"),))
ANSWERS: list[tuple[m.Request, Any, Any]] = [
    (m.Connect(), Capabilities, Capabilities(True, False, True, 10**9, roots=(b"/a", b"/b"))),
    (m.Stat(b"name"), Entry, ENTRY),
    (m.StatOpen(5), Entry | None, ENTRY),
    (m.ReadLink(b"link"), bytes, b"target"),
    (m.Fetch(b"name", b"v", 0, 10, "/nowhere", 1), m.Fetched, m.Fetched(10, [2**63 + 5], 0.1, 0.1)),
    (m.Remove(b"name"), type(None), None),
    (m.GetDiskUsage(), DiskUsage | None, DiskUsage(5, 4, 3, 2, 1)),
    (m.GetTraffic(), Traffic, Traffic(1, 2, 3, "away")),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)] if MESSAGES > CI_MESSAGES else []
Answering = Callable[[m.Call], bytes]


class _Process:
    """A trio.Process as far as WorkerProcess needs one."""

    pid = 4711
    returncode: int | None = None

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def kill(self) -> None:
        self.returncode = -9
        self._end()

    async def wait(self) -> int:
        self.kill()
        return -9


class MadWorkers:
    """In the place of worker processes: `answering` says what each writes at a call; `answer` is
    what one got to a question, once `answered` is set."""

    def __init__(self, nursery: trio.Nursery, answering: Answering) -> None:
        self.answering = answering
        self.started = 0
        self.answer: m.Answer | None = None
        self.answered = trio.Event()
        self._nursery = nursery

    async def start(self, start: m.Start, log_file: Path, lend: Any) -> WorkerProcess:
        self.started += 1
        ours, theirs = socket.socketpair()
        files, their_files = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        their_files.close()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
        scope = trio.CancelScope()
        self._nursery.start_soon(self._work, stream, scope)
        process: Any = _Process(scope.cancel)
        return WorkerProcess(process, ours, files, lend)

    async def _work(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        came = bytearray()
        decoder = msgspec.msgpack.Decoder(m.ToWorker)
        async with stream:
            with scope, suppress(trio.BrokenResourceError):
                while chunk := await stream.receive_some():
                    came += chunk
                    for body in _take_frames(came):
                        message = decoder.decode(body)
                        if isinstance(message, m.Call):
                            await stream.send_all(self.answering(message))
                        elif isinstance(message, m.Answer):
                            self.answer = message
                            self.answered.set()


def with_workers(
    monkeypatch: pytest.MonkeyPatch, story: Callable[[SiteClient, MadWorkers], Any]
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            workers = MadWorkers(nursery, well)
            monkeypatch.setattr(WorkerProcess, "start", workers.start)
            spec = SiteSpec(S3Site(), {"ns": S3Root("bucket")}, "/nowhere", 0, 0)
            client = SiteClient(m.Start(spec), Path(os.devnull), nursery)
            await story(client, workers)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def _answer_to(call: m.Call) -> Any:
    return next(
        (value for request, _, value in ANSWERS if type(request) is type(call.request)), None
    )


def well(call: m.Call) -> bytes:
    if isinstance(call.request, m.List):
        page = m.Reply(call.id, m.pack([ENTRY]), more=True)
        return m.frame(page) + m.frame(m.Reply(call.id, m.pack([])))
    return m.frame(m.Reply(call.id, m.pack(_answer_to(call))))


def madly(luck: random.Random, call: m.Call) -> bytes:
    """The answer changed, or something else altogether."""
    whole = well(call)
    body = bytearray(whole[4:])
    match luck.randrange(9):
        case 0 | 1 | 2:
            for _ in range(luck.randrange(1, 4)):
                body[luck.randrange(len(body))] = luck.getrandbits(8)
        case 3:
            del body[luck.randrange(len(body)) :]
        case 4:
            body = bytearray(luck.randbytes(luck.randrange(40)))
        case 5:
            return luck.choice((b"\xff\xff\xff\xff", bytes(4), luck.randbytes(30))) + whole
        case 6:
            odd: list[object] = [None, -1, 2**63, "text", [], {}, [1, 2], b"x" * 1000, 1.5]
            return m.frame(m.Reply(call.id, m.pack(luck.choice(odd)), more=luck.random() < 0.2))
        case 7:
            failure = m.Failure(luck.choice(("RemoteError", "Exception", "", "NotFound")), "no")
            return m.frame(m.Reply(call.id, failure=failure))
        case 8:
            others = [m.Advance(call.id, -(2**40)), m.Advance(10**9, 1), m.Reply(10**9)]
            return b"".join(map(m.frame, others)) + whole
    return _framed(body)


def _framed(body: bytes | bytearray) -> bytes:
    return len(body).to_bytes(4, "big") + body


def test_a_mad_worker_ends_only_itself(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(-(-MESSAGES // RUN_MESSAGES)):
        seed = SEED + number
        with_workers(monkeypatch, partial(_met, random.Random(seed), seed))
    tracebacks = [one.getMessage() for one in caplog.records if one.exc_info]
    assert not tracebacks, tracebacks[:3]


async def _met(luck: random.Random, seed: int, client: SiteClient, workers: MadWorkers) -> None:
    outcomes = {"done": 0, "refused": 0}
    for _ in range(RUN_MESSAGES):
        request, kind, value = luck.choice(ANSWERS)
        workers.answering = lambda call: madly(luck, call)
        began = trio.current_time()
        try:
            await client.call("ns", request, kind)
            outcomes["done"] += 1
        except RemoteError:
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"HPCFS_FUZZ_SEED={seed}: {request} raised {error!r}") from error
        assert trio.current_time() - began <= 60, f"HPCFS_FUZZ_SEED={seed}: {request}"
        workers.answering = well
        await _works(client, request, kind, value, seed)
    assert min(outcomes.values()) > RUN_MESSAGES // 20


async def _works(client: SiteClient, request: Any, kind: Any, value: Any, seed: int) -> None:
    """After a restart at most, which has a pause of a second before it."""
    with trio.fail_after(60):
        while True:
            try:
                assert await client.call("ns", request, kind) == value, f"HPCFS_FUZZ_SEED={seed}"
                return
            except Unreachable:
                await trio.sleep(1.0)


def test_an_answer_that_is_none_is_replaced_by_a_new_worker(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(client: SiteClient, workers: MadWorkers) -> None:
        workers.answering = lambda call: m.frame(m.Reply(call.id, m.pack("no entry")))
        with pytest.raises(RemoteError):
            await client.call("ns", m.Stat(b"name"), Entry)
        workers.answering = well
        await _works(client, m.Stat(b"name"), Entry, ENTRY, 0)
        assert workers.started == 2
        deep = b"\x91" * 100_000 + b"\xc0"
        workers.answering = lambda call: _framed(b"\x82\xa4type\xa5reply\xa1x" + deep)
        with pytest.raises(RemoteError):
            await client.call("ns", m.Stat(b"name"), Entry)
        workers.answering = well
        await _works(client, m.Stat(b"name"), Entry, ENTRY, 0)

    with_workers(monkeypatch, story)
    assert caplog.text.count("can't be understood") == 2
    assert not any(record.exc_info for record in caplog.records)


def test_questions_without_end_take_no_thread_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is put to the user in a thread, of which trio has forty."""
    asked = []

    def ask(text: str, echo: bool) -> None:
        asked.append(text)

    async def story(client: SiteClient, workers: MadWorkers) -> None:
        client._ask = ask
        questions = b"".join(m.frame(m.Question(n, "password?", False)) for n in range(500))
        workers.answering = lambda call: questions + well(call)
        with pytest.raises(RemoteError):
            await client.call("ns", m.Stat(b"name"), Entry)
        workers.answering = well
        await _works(client, m.Stat(b"name"), Entry, ENTRY, 0)

    with_workers(monkeypatch, story)
    assert len(asked) < 50


@pytest.mark.parametrize(
    ("pieces", "pause", "is_understood"),
    [
        (3, 600.0, True),  # the machine, or one of the two processes, was stopped
        (40, 0.5, False),
    ],
)
def test_only_a_frame_that_comes_without_end_is_none(
    pieces: int, pause: float, is_understood: bool
) -> None:
    came: list[m.FromWorker] = []

    async def main() -> None:
        ours, theirs = socket.socketpair()
        files, their_files = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process: Any = _Process(theirs.close)
        worker = WorkerProcess(process, ours, files)
        frame = m.frame(m.Reply(1, m.pack(b"x" * 1000)))
        with their_files:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(worker.run, came.append)
                for number in range(pieces):
                    if not worker.ended:
                        piece = slice(
                            len(frame) * number // pieces, len(frame) * (number + 1) // pieces
                        )
                        theirs.sendall(frame[piece])
                    await trio.sleep(pause)
                nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert bool(came) is is_understood


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), termios.error(5, "EIO"), trio.ClosedResourceError()]
)
def test_a_question_that_can_not_be_put_has_an_answer_all_the_same(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A login waits for it, however long the user takes."""

    def ask(text: str, echo: bool) -> str | None:
        raise error

    async def story(client: SiteClient, workers: MadWorkers) -> None:
        client._ask = ask
        workers.answering = lambda call: m.frame(m.Question(7, "password?", False)) + well(call)
        assert await client.call("ns", m.Stat(b"name"), Entry) == ENTRY
        await workers.answered.wait()
        assert workers.answer == m.Answer(7, None)
        assert client._questions == 0

    with_workers(monkeypatch, story)
    assert "nobody could be asked" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize(
    "field",
    [
        {"size": -1},
        {"size": 2**63},
        {"mode": -1},
        {"mode": 2**32},
        {"uid": 2**32},
        {"gid": -1},
        {"mtime_ns": 2**63},
        {"atime_ns": -(2**63) - 1},
    ],
)
def test_an_entry_that_the_kernel_could_not_be_told_is_none(field: dict[str, int]) -> None:
    packed = msgspec.msgpack.encode(ENTRY)
    assert msgspec.msgpack.decode(packed, type=Entry) == ENTRY
    try:
        packed = msgspec.msgpack.encode(msgspec.structs.replace(ENTRY, **field))
    except OverflowError:
        return  # it can't even be said
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(packed, type=Entry)
