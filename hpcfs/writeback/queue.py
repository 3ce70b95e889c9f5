"""`back` mode: what was closed here and is not on the remote yet.

close(2) returns once the journal has the file (`closed`); from then on it is this module's to bring
it to the remote, many files at once, as writeback/schedule.py says. The file's node keeps its
content until then, so that every reader of the mount sees it as it was written. What waits is
bounded: near `limit` bytes writers are slowed down, beyond it they wait.
"""

from __future__ import annotations

import logging
import math
import resource
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import trio

from hpcfs.content.content import Content
from hpcfs.inodes.tree import Node
from hpcfs.model.errors import (
    CacheFileGone,
    CacheFull,
    Conflict,
    FilesystemError,
    JournalFull,
    NotConnected,
    RemoteError,
    RemoteFailure,
    Unreachable,
)
from hpcfs.site.namespace import Namespace
from hpcfs.site.tasks import Tasks
from hpcfs.writeback.directory_times import DirectoryTimes
from hpcfs.writeback.schedule import Schedule
from hpcfs.writeback.uploader import Uploader

log = logging.getLogger(__name__)

DEFAULT_LIMIT = 10 * 1024**3
NEARLY = 0.8
"""Part of the limit from which on each write waits a little, up to SLOWEST_SECONDS per MiB."""
SLOWEST_SECONDS = 0.1
FULL_PATIENCE = 60.0
"""Seconds without any upload ending, for which a writer waits for room."""
MOST_FILES = 8192
"""Each has a descriptor open."""
TELL_SECONDS = 0.25
"""Between two reports of progress."""
ASK_SECONDS = 1.0
LONGEST_ASK_SECONDS = 5.0
"""Where somebody waits, a site that is out of reach is asked again after this, doubling up to that;
where nobody does, files are tried again as schedule.py says, and once it is back."""
RETURN_SECONDS = 1.0
"""How often to see whether a namespace that is away has come back, while files wait for it."""
LAST_PATIENCE = 0.5
"""Seconds for which a site may have been out of reach when the mount has ended."""
MIB = 1024 * 1024


@dataclass(frozen=True)
class SyncProgress:
    """How far the files are that somebody waits for, in files and in bytes.

    `reason` says why a site is out of reach now; it is empty where none is.
    """

    files_done: int
    files_total: int
    bytes_done: int
    bytes_total: int
    reason: str = ""


OnProgress = Callable[[SyncProgress], Awaitable[None]]


@dataclass
class Outage:
    """A site out of reach.

    `since` is when the first upload failed for want of it, by trio's clock. `is_asked` says that
    it is asked now and then, since somebody waits; `is_silent` that it did not answer the last
    time: then no upload is tried.
    """

    since: float
    reason: str
    is_asked: bool = False
    """Now and then, since somebody waits."""
    is_silent: bool = False
    """It did not answer when it was asked last: no upload is tried."""


class UploadQueue:
    """Brings what was closed in `back` mode to the remote, many files at once.

    `flush` uploads a file, raising RemoteError; `done` is called when nothing of it waits any more;
    at most `limit` bytes may wait.
    """

    def __init__(
        self,
        uploader: Uploader,
        flush: Callable[[Content], Awaitable[None]],
        done: Callable[[Content], None],
        nursery: Tasks,
        limit: int = DEFAULT_LIMIT,
    ) -> None:
        self._uploader = uploader
        self._flush = flush
        self._done = done
        self._nursery = nursery
        self.limit = limit
        self.schedule: Schedule[Content] = Schedule()
        self._counted: dict[Content, int] = {}
        """Bytes of what is dirty, as far as they count against the limit."""
        self._bytes = 0
        self._wake = trio.Event()
        self._ended = trio.Event()
        """Set, and replaced, whenever an upload ends."""
        self._outages: dict[Namespace, Outage] = {}
        self._waits: Counter[Namespace] = Counter()
        """How many wait for uploads to it."""
        self.directory_times = DirectoryTimes(self._has_pending, nursery)
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most_files = max(16, min(MOST_FILES, (soft - 512) // 2))

    # --- what programs do -----------------------------------------------------------------------

    async def closed(self, content: Content) -> None:
        """Return once the journal has a file that a program closed, or changed without opening it.

        Raises CacheFull, and once the error of an earlier attempt to upload it.
        """
        await self.persist(content)
        failure = content.upload.take_failure()  # not before: who is interrupted hears of nothing
        if failure is not None:
            raise type(failure)(failure.message)

    async def persist(self, content: Content, *, instead_of: str | None = None) -> None:
        """Return once the journal has the file, and queue it, whether or not the journal took it.

        `instead_of` is the row of a file that it replaces in the same step. Raises CacheFull.
        """
        try:
            if content.is_dirty() and not content.state.is_persisted:
                await self._uploader.persist(content, instead_of=instead_of)
        finally:
            self._schedule(content)

    def take_up(self, content: Content) -> None:
        """Queue a dirty file that nobody has open, unless it is queued already."""
        if content not in self.schedule:
            self._schedule(content)

    def _schedule(self, content: Content) -> None:
        if content.is_dirty():
            self._count(content)
            self.schedule.changed(content, trio.current_time())
            self._wake.set()

    def resume(self, content: Content, reason: str) -> None:
        """Queue a file that an earlier mount left.

        What was refused then (`reason`) waits for the user.
        """
        self._count(content)
        if reason:
            self.schedule.refused(content, reason)
        else:
            self.schedule.changed(content, trio.current_time())
        self._wake.set()

    def retry(self, content: Content) -> None:
        """Try the file again now, as the user wants."""
        content.upload.note_failure(None)
        self._hasten(content)
        self._ask_site(content.namespace)

    def _hasten(self, content: Content) -> None:
        self.take_up(content)
        self.schedule.hurry(content, trio.current_time())
        self._wake.set()

    def gone(self, content: Content) -> None:
        """Take a file off the queue that need not be uploaded any more."""
        self.schedule.gone(content)
        self._uncount(content)
        self._note_end()

    async def make_room(self, content: Content | None, length: int) -> None:
        """Wait until `length` bytes more may be written; without content, one file more be created.

        Raises JournalFull.
        """
        while self._is_full(content):
            ended = self._ended
            with trio.move_on_after(FULL_PATIENCE) as scope:
                self._hurry_all()
                await ended.wait()
            if scope.cancelled_caught:
                raise JournalFull(
                    "too much waits to be uploaded and nothing moves: 'hpcfs status' says why"
                )
        if content is not None:
            self._counted[content] = self._counted.get(content, 0) + length
            self._bytes += length
        excess = self._bytes / max(1, self.limit) - NEARLY
        if excess > 0 and self._others_move(content):
            await trio.sleep(SLOWEST_SECONDS * min(1.0, excess / (1 - NEARLY)) * length / MIB)

    def _is_full(self, content: Content | None) -> bool:
        """Whether to wait for others to be uploaded: one file larger than all is no reason to."""
        if content is None:
            return len(self.schedule) >= self._most_files and self._others_move(None)
        return self._bytes > self.limit and self._others_move(content)

    def _others_move(self, content: Content | None) -> bool:
        return any(
            other is not content and (item := self.schedule.item(other)) and item.state != "failed"
            for other in self.schedule
        )

    def _has_pending(self, directory: Node) -> bool:
        children = (directory.children or {}).values()
        return any(
            child.content is not None and child.content in self.schedule for child in children
        )

    def _count(self, content: Content) -> None:
        self._uncount(content)
        self._counted[content] = content.upload.dirty_bytes
        self._bytes += content.upload.dirty_bytes

    def _uncount(self, content: Content) -> None:
        self._bytes -= self._counted.pop(content, 0)

    # --- uploads --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Upload until cancelled; what is under way then is in the journal."""
        while True:
            self._wake = trio.Event()
            for content in self.schedule.take(trio.current_time()):
                self._nursery.start_soon(self._upload, content)
            due = self.schedule.next_due()
            with trio.move_on_at(due) if due < math.inf else trio.CancelScope():
                await self._wake.wait()

    async def _upload(self, content: Content) -> None:
        outage = self._outages.get(content.namespace)
        if outage is not None and outage.is_silent:
            self._failed(content, NotConnected(outage.reason))
            self._upload_ended(content)
            return
        try:
            await self._flush(content)
        except Conflict:
            self.schedule.gone(content)  # it is beside the other one, or kept
        except (RemoteError, FilesystemError) as error:
            self._failed(content, error)
        except OSError as error:
            self._failed(content, CacheFull(f"the cache's disk failed: {error.strerror}"))
        except Exception:  # a bug of ours, or a journal that fails, must not end the mount
            log.exception("uploading %r failed in an unexpected way", content.place.path)
            reason = "uploading failed in an unexpected way; the log has details"
            self._failed(content, RemoteFailure(reason))
        else:
            self.schedule.ended(content, trio.current_time())
            self._answers(content.namespace)
        self._upload_ended(content)

    def _failed(self, content: Content, error: RemoteError | FilesystemError) -> None:
        now = trio.current_time()
        again = isinstance(error, (Unreachable, CacheFileGone))  # the latter is written anew
        self.schedule.failed(content, now, error.message, again=again)
        if isinstance(error, Unreachable):
            outage = self._outages.get(content.namespace)
            if outage is None:
                outage = self._outages[content.namespace] = Outage(now, "")
                self._nursery.start_soon(self._await_return, content.namespace, outage)
            outage.reason = error.message
            if self._waits[content.namespace]:
                self._ask_site(content.namespace)
        if again:
            return
        log.error("%r was not uploaded: %s", content.place.path, error.message)
        content.upload.note_failure(error if isinstance(error, RemoteError) else None)
        if content.is_dirty():
            self._nursery.start_soon(self._note_failure, content, error.message)

    async def _note_failure(self, content: Content, reason: str) -> None:
        """Note it in the journal: the next mount does not try by itself what was refused."""
        item = self.schedule.item(content)
        if item is not None and item.state == "failed" and content.state.has_row:
            await self._uploader.note_progress(content, reason)

    def _upload_ended(self, content: Content) -> None:
        if content in self.schedule:
            self._count(content)
        else:
            self._uncount(content)
            if isinstance(content.place, Node):
                self.directory_times.uploaded(content.place.parent)
            self._done(content)
        self._note_end()
        self._wake.set()

    def _note_end(self) -> None:
        self._ended.set()
        self._ended = trio.Event()

    def _hurry_all(self) -> None:
        for content in self.schedule:
            item = self.schedule.item(content)
            if item is not None and item.state == "waiting" and not item.attempts:
                self.schedule.hurry(content, trio.current_time())
        self._wake.set()

    # --- sites out of reach -----------------------------------------------------------------------

    def _ask_site(self, namespace: Namespace) -> None:
        """Have one task ask a site that is out of reach whether it is back."""
        outage = self._outages.get(namespace)
        if outage is not None and not outage.is_asked:
            outage.is_asked = True
            self._nursery.start_soon(self._ask, namespace, outage)

    async def _ask(self, namespace: Namespace, outage: Outage) -> None:
        """Ask once, and then for as long as somebody waits.

        What waits is not tried before the site answers: each attempt of each file would cost a row.
        """
        pause = ASK_SECONDS
        while self._outages.get(namespace) is outage:
            outage.is_silent = await self._is_silent(namespace, outage)
            if not outage.is_silent:
                self._hurry_after(namespace)
            if not self._waits[namespace]:
                break
            await trio.sleep(pause)
            pause = min(2 * pause, LONGEST_ASK_SECONDS)
        outage.is_asked = outage.is_silent = False

    async def _await_return(self, namespace: Namespace, outage: Outage) -> None:
        """Try again what waits for a namespace once it is back: site/calls.py looks for it."""
        was_away = False
        while self._outages.get(namespace) is outage:
            if not any(content.namespace is namespace for content in self.schedule):
                del self._outages[namespace]
                return
            if was_away and not namespace.is_away:
                self._hurry_after(namespace)
            was_away = namespace.is_away
            await trio.sleep(RETURN_SECONDS)

    async def _is_silent(self, namespace: Namespace, outage: Outage) -> bool:
        try:
            await namespace.try_now()
        except Unreachable as error:
            outage.reason = error.message
            return True
        except RemoteError as error:  # the uploads are told so, too
            log.info("%s answers: %s", namespace.name, error.message)
        return False

    def _answers(self, namespace: Namespace) -> None:
        """Note that the site took an upload."""
        if self._outages.pop(namespace, None) is not None:
            self._hurry_after(namespace)

    def _why_not(self, namespace: Namespace) -> str:
        """Why nothing arrives there now; empty where something may."""
        outage = self._outages.get(namespace)
        return outage.reason if outage else namespace.failing

    def _hurry_after(self, namespace: Namespace) -> None:
        """Try again now what failed for want of the site."""
        for content in self.schedule:
            item = self.schedule.item(content)
            assert item
            if content.namespace is namespace and item.state == "waiting" and item.attempts:
                self.schedule.hurry(content, trio.current_time())
        self._wake.set()

    # --- waiting ------------------------------------------------------------------------------

    async def wait_for(
        self,
        contents: Iterable[Content],
        on_progress: OnProgress | None = None,
        patience: float = 0.0,
    ) -> None:
        """Return once the remote has these files.

        When all was tried, raises the first failure: a refusal, or that a site was out of reach for
        `patience` seconds.
        """
        await self._wait_for(contents, on_progress, patience, trio.current_time())

    async def drain(self) -> None:
        """Return when all is uploaded but what is refused or out of reach: the end of the mount.

        A lost connection is made anew.
        """
        moving = [c for c in self.schedule if (i := self.schedule.item(c)) and i.state != "failed"]
        try:
            await self._wait_for(moving, None, LAST_PATIENCE, -math.inf)
        except RemoteError as error:
            log.warning("not all is uploaded, and stays in the journal: %s", error.message)

    async def _wait_for(
        self,
        contents: Iterable[Content],
        on_progress: OnProgress | None,
        patience: float,
        began: float,
    ) -> None:
        """An outage counts from when it was noticed, but not from before `began`."""
        waiting = {content: content.upload.dirty_bytes for content in contents}
        total_files, total_bytes = len(waiting), sum(waiting.values())
        attempts: dict[Content, int] = {}
        for content in waiting:
            self._hasten(content)
            item = self.schedule.item(content)
            attempts[content] = item.attempts if item else 0
        namespaces = Counter({content.namespace for content in waiting})
        self._waits.update(namespaces)
        failures: dict[Content, RemoteError] = {}
        try:
            while left := [c for c in waiting if c in self.schedule and c not in failures]:
                for content in left:
                    reason = self._given_up(content, attempts[content], patience, began)
                    if reason is not None:
                        failures[content] = _failure_of(content, reason)
                if on_progress is not None:
                    bytes_left = sum(content.upload.bytes_left for content in left)
                    done = max(0, total_bytes - bytes_left)
                    away = next((why for n in namespaces if (why := self._why_not(n))), "")
                    files = total_files - len(left)
                    await on_progress(SyncProgress(files, total_files, done, total_bytes, away))
                ended = self._ended
                with trio.move_on_after(TELL_SECONDS):
                    await ended.wait()
        finally:
            self._waits.subtract(namespaces)
        await self.directory_times.finish()
        for failure in failures.values():
            raise failure

    def _given_up(
        self, content: Content, attempts: int, patience: float, began: float
    ) -> str | None:
        """Return why a file is not waited for any more, after so many attempts before; or None."""
        item = self.schedule.item(content)
        assert item
        if item.state == "failed":
            return item.reason
        outage = self._outages.get(content.namespace)
        if item.state != "waiting" or item.attempts <= attempts or outage is None:
            return None
        end = max(outage.since, began) + patience
        return item.reason if trio.current_time() >= end else None


def _failure_of(content: Content, reason: str) -> RemoteError:
    shown = content.place.path.decode(errors="replace")
    return RemoteFailure(f"{content.namespace.name}/{shown}: {reason}")
