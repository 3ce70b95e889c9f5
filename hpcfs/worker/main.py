"""The worker process: carries out the daemon's requests at one site, on asyncio and uvloop.

Started by site/client.py with one end of a socket pair; ends when the daemon closes the other.
It holds no state that cannot be rebuilt and may be killed at any moment. It never imports trio,
pyfuse3 or anything of the daemon's beyond protocol/messages.py.

The bytes it downloads go straight into the daemon's cache files, and those it uploads come from
there; the block checksums are computed here, where the bytes are still in the processor's cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import itertools
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import partial
from typing import Any

import msgspec
import uvloop

from hpcfs.model.entries import LIST_PAGE_ENTRIES, Entry
from hpcfs.model.errors import (
    InvalidRequest,
    ProtocolError,
    RemoteError,
    RemoteFailure,
    TimedOut,
)
from hpcfs.protocol import messages as m
from hpcfs.remotes import life, machine_changes
from hpcfs.remotes.base import MAX_FILE_BYTES, Remote, ReportProgress, Site, no_report
from hpcfs.remotes.open import open_site
from hpcfs.system import dumps, limits, logs, signals
from hpcfs.worker.cache_io import Borrower, CacheDisk, CacheSource
from hpcfs.worker.movement import Movement

log = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""malloc.h's."""
KEPT_PIECE_BYTES = 32 * 1024 * 1024
KEPT_BYTES = 64 * 1024 * 1024
LOOK_SECONDS = 1.0
"""Between looks at what moved, while calls are under way."""
TOLD_BYTES = 64 * 1024
"""What must have moved before the daemon hears of it. Fewer within its patience are a drip, and the
link counts as stalled: with 30 s, at 2 kB/s."""


class DaemonGone(Exception):
    """The daemon closed its end or was killed: nobody is left to be told anything."""


class DaemonConnection:
    """The process's side of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._questions: dict[int, asyncio.Future[str | None]] = {}
        self._numbers = itertools.count()
        """None twice: an answer to a question that was given up must not pass for another's."""

    async def receive(self, kind: type[msgspec.Struct] | object) -> object:
        """Return the next message. Raises asyncio.IncompleteReadError when the daemon is gone."""
        header = await self._reader.readexactly(m.FRAME_HEADER.size)
        (length,) = m.FRAME_HEADER.unpack(header)
        return msgspec.msgpack.decode(await self._reader.readexactly(length), type=kind)

    async def send(self, message: msgspec.Struct) -> None:
        """Send a message, and wait until the socket takes it. Raises DaemonGone."""
        if self._writer.is_closing():  # uvloop has a RuntimeError for who writes now
            raise DaemonGone
        self._writer.write(m.frame(message))
        try:
            await self._writer.drain()
        except ConnectionError:
            raise DaemonGone from None

    def send_soon(self, message: msgspec.Struct) -> None:
        """Send a message without waiting; nothing happens where the daemon is gone."""
        if not self._writer.is_closing():  # the daemon may have been killed
            self._writer.write(m.frame(message))

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        """Ask whoever is at the daemon's terminal (base.Prompter); nobody is where it is gone."""
        number = next(self._numbers)
        future: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        try:
            await self.send(m.Question(number, text, echo))
            return await future
        except DaemonGone:
            return None
        finally:
            del self._questions[number]

    def answered(self, answer: m.Answer) -> None:
        """Hand an answer to whoever asked."""
        future = self._questions.get(answer.id)
        if future and not future.done():
            future.set_result(answer.text.value if answer.text else None)


class Worker:
    """Runs calls against a site, each in a task of its own."""

    def __init__(self, connection: DaemonConnection, site: Site, disk: CacheDisk) -> None:
        self._connection = connection
        self._site = site
        self._disk = disk
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._begun = asyncio.Event()

    async def run(self) -> None:
        """Carry out calls until the daemon is gone."""
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                message = await self._connection.receive(m.ToWorker)
                match message:
                    case m.Call():
                        self._start(message)
                    case m.Cancel():
                        if task := self._tasks.get(message.id):
                            task.cancel()
                    case m.Answer():
                        self._connection.answered(message)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def tell_movement(self) -> None:
        """Tell the daemon of bytes that move, until cancelled."""
        movement = Movement(self._site.traffic)
        while True:
            self._begun.clear()
            await self._begun.wait()
            await asyncio.sleep(LOOK_SECONDS)  # most calls are over by then
            movement.take()
            untold = 0
            while self._tasks:
                await asyncio.sleep(LOOK_SECONDS)
                untold += movement.take()
                if untold >= TOLD_BYTES:
                    self._connection.send_soon(m.Moved(untold))
                    untold = 0

    def _start(self, call: m.Call) -> None:
        task = asyncio.create_task(self._answer(call))
        self._tasks[call.id] = task
        self._begun.set()
        task.add_done_callback(partial(self._ended, call.id))

    def _ended(self, call_id: int, task: asyncio.Task[None]) -> None:
        del self._tasks[call_id]
        if task.cancelled():  # before it began
            self._connection.send_soon(_given_up(call_id))

    async def _answer(self, call: m.Call) -> None:
        with contextlib.suppress(DaemonGone):
            await self._connection.send(await self._outcome(call))

    async def _outcome(self, call: m.Call) -> m.Reply:
        try:
            return await self._reply(call)
        except DaemonGone:
            raise
        except RemoteError as error:
            return m.Reply(call.id, failure=m.Failure.of(error))
        except asyncio.CancelledError:  # the daemon waits to hear that nothing is written any more
            return _given_up(call.id)
        except Exception:  # a bug of ours must not take the other calls with it
            log.exception("%s failed in an unexpected way", type(call.request).__name__)
            failure = RemoteFailure("an unexpected failure in hpcfs; the log has details")
            return m.Reply(call.id, failure=m.Failure.of(failure))

    async def _reply(self, call: m.Call) -> m.Reply:
        if isinstance(call.request, m.GetTraffic):
            return m.Reply(call.id, m.pack(self._site.traffic()))
        if isinstance(call.request, m.Connect):
            if call.request.renew:
                await self._site.renew()
            elif call.request.now:
                self._site.try_now()
        remote = self._site.remote(call.namespace)
        progress = CallProgress(self._connection, call.id)
        with life.reported_to(progress.renew):
            return m.Reply(call.id, m.pack(await self._result(remote, call, progress.report)))

    async def _result(self, remote: Remote, call: m.Call, report: ReportProgress) -> object:
        match call.request:
            case m.List(path):
                await self._send_pages(call.id, remote.list(path))
                return []
            case m.Fetch():
                return await fetch(remote, call.request, self._disk)
            case m.Upload():
                return await upload(remote, call.request, report)
            case m.UploadPiece():
                await upload_piece(remote, call.request)
                return None
            case _:
                return await perform(remote, call.request, report)

    async def _send_pages(self, call_id: int, pages: AsyncIterator[Sequence[Entry]]) -> None:
        async for page in pages:
            for start in range(0, len(page), LIST_PAGE_ENTRIES):
                part = page[start : start + LIST_PAGE_ENTRIES]
                await self._connection.send(m.Reply(call_id, m.pack(part), more=True))


class CallProgress:
    """Tells the daemon how far a call is, and that it goes on."""

    def __init__(self, connection: DaemonConnection, call_id: int) -> None:
        self._connection, self._call_id, self._done = connection, call_id, 0

    def report(self, done: int) -> None:
        """Tell that so much is done (see `ReportProgress`)."""
        self._done = done
        self.renew()

    def renew(self) -> None:
        """Tell that the remote is there, and no more is done."""
        self._connection.send_soon(m.Advance(self._call_id, self._done))


async def upload(remote: Remote, request: m.Upload, report: ReportProgress) -> Entry:
    """Upload a file from the cache file."""
    source = CacheSource(request.cache_file, request.request.size)
    try:
        return await remote.upload(request.request, source, report)
    finally:
        source.close()


async def upload_piece(remote: Remote, request: m.UploadPiece) -> None:
    """Send a piece from the cache file, all of which is the source: several pieces may make one
    part of the remote's."""
    source = CacheSource(request.cache_file, MAX_FILE_BYTES)
    try:
        await remote.upload_piece(request.request, source)
    finally:
        source.close()


def _given_up(call_id: int) -> m.Reply:
    return m.Reply(call_id, failure=m.Failure.of(TimedOut("the request was given up")))


async def fetch(remote: Remote, request: m.Fetch, disk: CacheDisk) -> m.Fetched:
    """Bring a range into the cache file. Raises RemoteError; when cancelled, nothing is written any
    more."""
    began = time.monotonic()
    pieces = await remote.fetch(
        request.path,
        request.version,
        request.offset,
        request.length,
        request.handle,
        growing=request.growing,
        urgent=request.urgent,
    )
    if sum(map(len, pieces)) != request.length:
        raise ProtocolError("the remote gave another number of bytes than was asked for")
    goal = request.cache_file, request.offset
    fetch_seconds = time.monotonic() - began
    if disk.is_quick(request.length):
        stored = disk.store(*goal, pieces)
    else:
        storing = asyncio.create_task(asyncio.to_thread(disk.store, *goal, pieces))
        try:
            stored = await asyncio.shield(storing)
        except asyncio.CancelledError:
            await asyncio.wait([storing])  # the thread writes to its end: not before has this ended
            raise
    return m.Fetched(request.length, stored.checksums, fetch_seconds, stored.seconds)


def perform(
    remote: Remote, request: m.Request, report: ReportProgress = no_report
) -> Coroutine[object, object, object]:
    """Carry out a request that is one call of the remote."""
    match request:
        case m.Connect():
            return remote.connect()
        case m.Stat(path):
            return remote.stat(path)
        case m.StatOpen(handle):
            return remote.stat_open(handle)
        case m.ReadLink(path):
            return remote.read_link(path)
        case m.ReadUnsized(path, offset, length, handle):
            return remote.read_unsized(path, offset, length, handle)
        case m.Release(handle):
            return remote.release(handle)
        case m.Create(path, mode, handle):
            return remote.create(path, mode, handle)
        case m.MakeDirectory(path, mode):
            return remote.make_directory(path, mode)
        case m.MakeSymlink(path, target):
            return remote.make_symlink(path, target)
        case m.MakeLink(existing, path):
            return remote.make_link(existing, path)
        case m.Rename(path, target, replace):
            return remote.rename(path, target, replace=replace, report=report)
        case m.Remove(path):
            return remote.remove(path)
        case m.RemoveDirectory(path):
            return remote.remove_directory(path)
        case m.SetAttributes(path, attributes):
            return remote.set_attributes(path, attributes)
        case m.Truncate(path, size):
            return remote.truncate(path, size)
        case m.CheckWritable(path):
            return remote.check_writable(path)
        case m.GetDiskUsage():
            return remote.disk_usage()
    raise InvalidRequest(f"an unknown request: {type(request).__name__}")


async def serve(sock: socket.socket, files: socket.socket) -> None:
    """Carry out the daemon's requests on `sock` until it is gone; `files` is where it lends its
    files in memory."""
    reader, writer = await asyncio.open_unix_connection(sock=sock, limit=4 * 1024 * 1024)
    connection = DaemonConnection(reader, writer)
    start = await connection.receive(m.Start)
    assert isinstance(start, m.Start)
    set_up_logging(start.log_level)
    asyncio.get_running_loop().set_exception_handler(log_stray)
    site = open_site(start.spec, connection)
    spare_the_collector()
    try:
        disk = CacheDisk(borrow=Borrower(files).borrow)
        async with machine_changes.watched(lambda _: site.network_changed()):
            worker = Worker(connection, site, disk)
            telling = asyncio.create_task(worker.tell_movement())
            try:
                await worker.run()
            finally:
                telling.cancel()
    finally:
        await site.close()
        writer.close()


def spare_the_collector() -> None:
    """Keep what the libraries brought out of garbage collection. Python's collector of cycles would
    walk all of it again and again, and nothing moves meanwhile: 5 ms for SFTP, 35 for S3 each
    time."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def set_up_logging(level: str) -> None:
    """Log to stderr, which the daemon made its log file."""
    handler = logging.StreamHandler()
    handler.setFormatter(logs.Formatter("transfer"))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("asyncssh", "botocore", "aiobotocore", "urllib3", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_stray(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log a failure of a library's own task: a cut connection is told by the request it broke, and
    needs no traceback; anything else does."""
    error = context.get("exception")
    if isinstance(error, OSError):
        log.debug("%s: %s", context.get("message"), error)
    else:
        loop.default_exception_handler(context)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory. What a fetch brought is freed once it is stored, and the next
    one needs as much; by default glibc hands it to the kernel and back each time: 0.3 of 0.6 CPU
    seconds per GB over S3."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(M_MMAP_THRESHOLD, KEPT_PIECE_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def main() -> None:
    """Run the worker process on the two sockets whose numbers are its arguments."""
    dumps.forbid()
    limits.raise_open_files()
    signals.outlive_job()  # a shutdown sends SIGTERM to all, while the daemon has yet to upload
    keep_freed_memory()
    messages, files = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    uvloop.run(serve(messages, files))


if __name__ == "__main__":
    main()
