"""The daemon's side of a transfer process: starts it, calls it, keeps every deadline.

One `SiteClient` per site. The process is started on first use and again after it died; calls that
were under way then fail with Unreachable, and nothing else is lost. Every call has a deadline that
progress renews; a call that nobody waits for any more is cancelled in the process too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import trio

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.errors import (
    AccessRefused,
    HostKeyRefused,
    NotConnected,
    ProtocolError,
    RemoteError,
    TimedOut,
    Unreachable,
)
from hpcfs.model.sites import Secret
from hpcfs.model.usage import Traffic
from hpcfs.protocol import messages as m
from hpcfs.site.tasks import Tasks
from hpcfs.site.worker_process import Lend, WorkerProcess, gone, lend_nothing

log = logging.getLogger(__name__)
T = TypeVar("T")

SiteState = Literal["idle", "connecting", "connected", "failed"]

Ask = Callable[[str, bool], str | None]
"""(text, echo) -> what the user typed, None if nobody can be asked. Called in a thread."""


def ask_nobody(text: str, echo: bool) -> str | None:
    """Leave every question without an answer."""
    return None


CALL_TIMEOUT = 30.0
"""Seconds without an answer or progress. A login that waits for the user does not count."""
_ANSWERED_HERE = (m.Release, m.StatOpen, m.GetDiskUsage, m.GetTraffic)
"""The transfer process may answer these without the site: they don't tell that it is there."""
MOST_QUESTIONS = 10
"""Of one site at the same time. Each waits in a thread, as do reads of cached files."""
_BULK = (m.Fetch, m.ReadUnsized, m.Upload, m.UploadPiece)
_MOVED_BY_OTHERS = 64 * 1024 * 1024
"""More than all transfers of a site have under way at a time."""
_RESTART_PAUSE = 1.0
_CONFIRM_SECONDS = 5.0
_TRAFFIC_SECONDS = 0.5
"""For an answer that takes a process less than a millisecond, unless it is busy."""


@dataclass(eq=False)
class _Pending:
    scope: trio.CancelScope
    timeout: float
    on_page: Callable[[bytes], None] | None
    on_progress: Callable[[int], None] | None
    done: trio.Event
    asks_site: bool
    reply: m.Reply | None = None
    given_up: bool = False
    heard: bool = False
    """Whether the site answered anything while this call waited."""
    is_bulk: bool = False
    """Whether bytes that move may be this call's."""
    moved: int = 0
    """The bytes of whichever calls that moved meanwhile."""
    progress: int = 0

    def renew(self) -> None:
        self.scope.deadline = trio.current_time() + self.timeout

    def advance(self) -> None:
        self.renew()
        if self.on_progress:
            self.on_progress(self.progress)


class SiteClient:
    """Calls the transfer process of one site; calls run concurrently.

    `log_file` receives what the process logs; `lend` tells the descriptor of a file in memory that
    a Fetch names; `ask` answers the site's questions.
    """

    def __init__(
        self,
        start: m.Start,
        log_file: Path,
        nursery: Tasks,
        lend: Lend = lend_nothing,
        ask: Ask = ask_nobody,
    ) -> None:
        self._ask = ask
        self._state: SiteState = "idle"
        self._reason = ""
        self._away = ""
        self._refusals: dict[str, RemoteError] = {}
        """By namespace: what fails there, though the site answers."""
        self._start_message = start
        self._log_file = log_file
        self._lend = lend
        self._nursery = nursery
        self._child: WorkerProcess | None = None
        self._starting = trio.Lock()
        self._last_start = -math.inf
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._questions = 0
        self._asked_at = -math.inf
        """When the user last answered a question."""
        self._remarks: dict[str, str] = {}

    # --- calls --------------------------------------------------------------------------------

    async def call(
        self,
        namespace: str,
        request: m.Request,
        kind: type[T],
        timeout: float = CALL_TIMEOUT,
        on_progress: Callable[[int], None] | None = None,
    ) -> T:
        """Return the answer to `request`, decoded as `kind`.

        `on_progress` is called with the bytes of a long one that are done. Without an answer or
        progress for `timeout` seconds it fails. Raises RemoteError.
        """
        child = self._child or await self._start_process()
        reply = await self._exchange(child, namespace, request, timeout, None, on_progress)
        try:
            answer = msgspec.msgpack.decode(reply.result, type=kind)
        except (msgspec.DecodeError, RecursionError) as error:
            child.is_not_understood(error)
            raise ProtocolError(f"the answer to {type(request).__name__} is none") from None
        if isinstance(answer, Capabilities):
            self._remarks[namespace] = answer.remark
        return answer

    async def call_pages(
        self,
        namespace: str,
        request: m.List,
        on_page: Callable[[bytes], None],
        timeout: float = CALL_TIMEOUT,
    ) -> None:
        """Give each page, still encoded (list[Entry] in MessagePack), to `on_page`.

        Raises RemoteError.
        """
        child = self._child or await self._start_process()
        await self._exchange(child, namespace, request, timeout, on_page)

    async def _exchange(
        self,
        child: WorkerProcess,
        namespace: str,
        request: m.Request,
        timeout: float,
        on_page: Callable[[bytes], None] | None,
        on_progress: Callable[[int], None] | None = None,
    ) -> m.Reply:
        self._next_id += 1
        call_id = self._next_id
        with trio.CancelScope() as scope:
            asks_site = not isinstance(request, _ANSWERED_HERE)
            pending = _Pending(
                scope,
                timeout,
                on_page,
                on_progress,
                trio.Event(),
                asks_site,
                is_bulk=isinstance(request, _BULK),
            )
            if not self._questions:
                pending.renew()
            self._pending[call_id] = pending
            try:
                child.send(m.Call(call_id, namespace, request))
                await pending.done.wait()
            finally:
                if not pending.done.is_set():
                    await self._give_up(child, call_id, pending, request)
                del self._pending[call_id]
        return self._outcome(pending, namespace, request)

    async def _give_up(
        self, child: WorkerProcess, call_id: int, pending: _Pending, request: m.Request
    ) -> None:
        """Nobody waits for the answer any more.

        A fetch may be about to write into the cache file, where somebody else may write next: it
        counts as ended only when the process confirmed it, or was ended itself.
        """
        pending.given_up = True
        if child.ended:
            return
        child.send(m.Cancel(call_id))
        if not isinstance(request, m.Fetch):
            return
        with trio.move_on_after(_CONFIRM_SECONDS, shield=True):
            await pending.done.wait()
        if not pending.done.is_set():
            child.kill()
            with trio.CancelScope(shield=True):
                await pending.done.wait()  # a killed process ends at once

    def _outcome(self, pending: _Pending, namespace: str, request: m.Request) -> m.Reply:
        reply = pending.reply
        if reply is None or (pending.given_up and reply.failure):
            what = type(request).__name__
            error = TimedOut(f"no answer to {what} within {pending.timeout:g} s")
            if not pending.heard and pending.asks_site and self._state != "failed":
                self._state, self._reason = "failed", error.message
            raise error
        if reply.failure is None:
            if pending.asks_site:
                self._state, self._reason = "connected", ""
                self._refusals.pop(namespace, None)
            return reply
        failure = reply.failure.error()
        if isinstance(failure, Unreachable):
            self._state, self._reason = "failed", failure.message
        elif failure.lasting or isinstance(request, m.Connect):
            self._refusals[namespace] = failure
        raise failure

    def note_silence(self, reason: str) -> None:
        """Note for the status that the site does not answer."""
        self._state, self._reason = "failed", reason

    def asked_within(self, seconds: float) -> bool:
        """Whether the user is being asked something for this site, or was just now."""
        return self._questions > 0 or trio.current_time() - self._asked_at < seconds

    def namespace_state(self, namespace: str) -> tuple[SiteState, str]:
        """Return the state for the status, and why where it failed."""
        if refusal := self._refusals.get(namespace):
            return "failed", refusal.message
        remark = self._remarks.get(namespace, "") if self._state == "connected" else ""
        return self._state, self._reason or remark

    def needs_login(self, namespace: str) -> bool:
        """Return whether the login was refused, or its host key: `hpcfs login` tries again."""
        return isinstance(self._refusals.get(namespace), AccessRefused | HostKeyRefused)

    @contextmanager
    def asking(self, ask: Ask) -> Iterator[None]:
        """Put the site's questions to somebody else in the meantime."""
        before, self._ask = self._ask, ask
        try:
            yield
        finally:
            self._ask = before

    async def traffic(self) -> Traffic | None:
        """Return what is under way, for the status; nothing is connected or started for it.

        None where the process is too busy to tell.
        """
        if self._child is None:
            return Traffic()
        with trio.move_on_after(_TRAFFIC_SECONDS):
            try:
                found = await self.call("", m.GetTraffic(), Traffic)
            except RemoteError:  # it ended just now
                return Traffic()
            self._note_away(found.away)
            return found
        return None

    def _note_away(self, away: str) -> None:
        """Note that a connection that is kept up is lost, or back, without a request that would
        tell."""
        if away != self._away:
            self._away = self._reason = away
            self._state = "failed" if away else "connected"

    # --- the process ---------------------------------------------------------------------------

    async def _start_process(self) -> WorkerProcess:
        async with self._starting:
            if self._child:
                return self._child
            if trio.current_time() < self._last_start + _RESTART_PAUSE:
                raise NotConnected(gone().message)
            self._last_start = trio.current_time()
            self._state = "connecting"
            try:
                self._child = await WorkerProcess.start(
                    self._start_message, self._log_file, self._lend
                )
            except OSError as error:
                raise NotConnected(f"no worker process can be started: {error}") from None
            self._nursery.start_soon(self._supervise, self._child)
            return self._child

    @property
    def pid(self) -> int | None:
        """The process id of the transfer process, None if it does not run."""
        return self._child.pid if self._child else None

    async def _supervise(self, child: WorkerProcess) -> None:
        """When it ends, also by the mount's own end, fail what is under way."""
        try:
            await child.run(partial(self._dispatch, child))
        finally:
            self._child = None
            error = gone()
            self._state, self._reason = "failed", error.message
            for call_id, pending in self._pending.items():
                pending.reply = m.Reply(call_id, failure=m.Failure.of(error))
                pending.done.set()

    def _dispatch(self, child: WorkerProcess, message: m.FromWorker) -> None:
        match message:
            case m.Question():
                if self._questions >= MOST_QUESTIONS:
                    raise ProtocolError("questions without end")
                self._questions += 1
                self._nursery.start_soon(self._put_question, child, message)
            case m.Advance():
                if pending := self._pending.get(message.id):
                    self._heard(pending)
                    pending.moved, pending.progress = 0, message.done
                    pending.advance()
            case m.Moved():
                self._moved(message.count)
            case m.Reply():
                if pending := self._pending.get(message.id):
                    self._heard(pending)
                    self._replied(pending, message)

    def _moved(self, count: int) -> None:
        """Renew the deadlines of transfers, one of which moved, unless its turn should have come
        long ago: then only others move."""
        for pending in self._pending.values():
            pending.moved += count
            if pending.is_bulk and pending.moved <= _MOVED_BY_OTHERS:
                self._heard(pending)
                pending.advance()

    def _heard(self, answered: _Pending) -> None:
        """Note that the site is there, unless the process answered by itself."""
        if answered.asks_site and not answered.given_up:
            for waiting in self._pending.values():
                waiting.heard = True

    def _replied(self, pending: _Pending, reply: m.Reply) -> None:
        if reply.more:
            pending.renew()
            if pending.on_page:
                pending.on_page(bytes(reply.result))
            return
        pending.reply = reply
        pending.done.set()

    async def _put_question(self, child: WorkerProcess, question: m.Question) -> None:
        """While the user thinks, no deadline runs. The question is counted already, and gets an
        answer in any case: a login waits for it without a limit."""
        for pending in self._pending.values():
            pending.scope.deadline = math.inf
        text: str | None = None
        try:
            text = await trio.to_thread.run_sync(
                self._ask, question.text, question.echo, abandon_on_cancel=True
            )
        except Exception as error:  # a terminal or client that is gone has many
            log.warning("nobody could be asked for a login: %s", str(error) or type(error).__name__)
        finally:
            self._questions -= 1
            self._asked_at = trio.current_time()
            for pending in self._pending.values():
                pending.renew()
        if not child.ended:
            child.send(m.Answer(question.id, Secret(text) if text is not None else None))
