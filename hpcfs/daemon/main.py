"""The mount daemon's life: it mounts, serves and unmounts.

Order matters at both ends. At the start: the cache's lock, then the mount, then the first logins
(with the terminal to ask questions), then `on_ready`. At the end: no more kernel requests, then
what is dirty goes to the remotes or is kept, then the cache's index, then the lock.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import trio

from hpcfs.cache.directory import CacheUnusable
from hpcfs.cache.renewal import renew_if_removed
from hpcfs.cache.store import Store
from hpcfs.config.config import Settings
from hpcfs.control import control, mountpoint, server as control_server
from hpcfs.daemon.assembly import Mount, assemble
from hpcfs.daemon.cache_commands import CacheCommands
from hpcfs.daemon.letting_go import let_go
from hpcfs.daemon.logins import Logins
from hpcfs.daemon.questions import Questions
from hpcfs.daemon.services import Services
from hpcfs.daemon.status import StatusReporter
from hpcfs.daemon.write_commands import WriteCommands
from hpcfs.kernel.mount import KernelMount
from hpcfs.model.errors import RemoteError, SetupError
from hpcfs.site.client import Ask
from hpcfs.site.namespace import Namespace
from hpcfs.system import dumps, limits, logs, mountinfo, signals
from hpcfs.writeback.journal import Journal

log = logging.getLogger(__name__)

OnReady = Callable[[control.MountStatus], None]

SAVE_SECONDS = 2.0
"""How far the cache's index may lag behind; a killed daemon's last blocks are fetched again."""
MAX_KERNEL_REQUESTS = 4096
"""Of all namespaces; one that does not answer can't use these up (kernel/requests.py)."""
UNMOUNT_CHECK_SECONDS = 0.5
"""After each change of the table of mounts, which may change often."""
LONGEST_UNCHECKED_SECONDS = 30.0
UNMOUNT_PATIENCE = 3.0
"""Seconds that the kernel's last requests may take after an unmount, before they are cancelled."""


class MountFailed(SetupError):
    """The mount could not be made."""


def serve(
    settings: Settings,
    *,
    ask: Ask,
    on_ready: OnReady,
    foreground: bool,
    owner: int | None = None,
) -> None:
    """Mount and serve until unmounted. `ask` is used, in a thread, until `on_ready` was called.

    With `owner`, a pipe to read from, it also unmounts at the pipe's end, and then no signal makes
    it do so once it is mounted. Raises MountFailed before `on_ready` was called.
    """
    dumps.forbid()
    limits.raise_open_files()
    try:
        logs.set_up(settings.log_file, settings.log_level, "mount", to_stderr=foreground)
    except SetupError as refused:
        raise MountFailed(str(refused)) from None
    logging.getLogger("pyfuse3").setLevel(logging.WARNING)
    try:
        trio.run(_Daemon(settings, ask, on_ready, owner).run)
    except* SetupError as refused:
        raise MountFailed(str(_first(refused))) from None
    except* Exception:
        log.exception("the mount daemon failed")
        raise
    finally:
        log.info("the daemon of %s ends", settings.mountpoint)


def _first(error: BaseException) -> BaseException:
    """trio wraps what ends a nursery in groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _close_store(store: Store) -> None:
    with trio.CancelScope(shield=True):
        try:
            await store.close()
        except (OSError, sqlite3.Error) as error:
            log.error("the cache's index could not be saved: %s", error)  # noqa: TRY400


class _Daemon:
    """One mount from its start to its end; its parts exist from `run` on."""

    def __init__(self, settings: Settings, ask: Ask, on_ready: OnReady, owner: int | None) -> None:
        self._settings = settings
        self._owner = owner
        self._questions = Questions(ask)
        self._on_ready = on_ready
        self._mount: Mount
        self._cache: CacheCommands
        self._writes: WriteCommands
        self._logins: Logins
        self._status: StatusReporter
        self._kernel: KernelMount

    # --- from start to end ----------------------------------------------------------------------

    async def run(self) -> None:
        """Mount, serve until unmounted, and finish what is open. Raises MountFailed."""
        settings = self._settings
        async with AsyncExitStack() as stack:
            store, journal = self._open_cache(stack)
            nursery = await stack.enter_async_context(trio.open_nursery())
            stack.callback(nursery.cancel_scope.cancel)
            services = Services(nursery, store.troubles)
            mount = assemble(settings, store, journal, self._questions.ask, services)
            self._mount, closer = mount, mount.fs.closer
            self._cache = CacheCommands(settings, store, mount.fs, mount.origins)
            self._writes = WriteCommands(settings, mount.pending)
            self._logins = Logins(settings, mount)
            self._status = StatusReporter(settings, mount, self._writes.summary)
            self._kernel = KernelMount(mount.fs)  # commands ask for its requests from now on
            await services.start(
                control_server.serve,
                settings.socket,
                self._status.live_status,
                self._answer,
                self._logins.answer,
            )
            await self._resume()
            services.keep_running("keeping the cache small", store.evict_forever)
            services.keep_running("the queue of uploads", closer.queue.run)
            services.keep_running("saving the cache's index", self._save_forever)
            services.keep_running("removing old cache files", store.remove_strays_forever)
            await self._serve_kernel()
            log.info("unmounted; finishing what is open")
            await self._let_go()
            await mount.fs.files.close_all()
            await closer.queue.drain()

    def _open_cache(self, stack: AsyncExitStack) -> tuple[Store, Journal]:
        settings = self._settings
        holder = f"the mount at {settings.mountpoint} (pid {os.getpid()})"
        try:
            store = Store.open(
                settings.cache_dir, settings.cache_size, holder, settings.cache_min_free
            )
            stack.push_async_callback(_close_store, store)
            journal = Journal.open(settings.cache_dir, store.troubles)
            stack.push_async_callback(journal.close)
        except CacheUnusable as error:
            raise MountFailed(str(error)) from None
        except (OSError, sqlite3.Error) as error:
            raise MountFailed(
                f"the cache directory {settings.cache_dir} can't be used: {error}"
            ) from None
        return store, journal

    async def _resume(self) -> None:
        """Go on with what an earlier mount had not uploaded."""
        mount = self._mount
        try:
            count = self._status.resumed_files = await mount.recovery.restore(mount.journal.rows)
        except (OSError, sqlite3.Error) as error:
            raise MountFailed(
                f"what an earlier mount left in {self._settings.cache_dir} can't be read: {error}"
            ) from None
        if count:
            log.info("%d files that an earlier mount had not uploaded are uploaded now", count)

    async def _serve_kernel(self) -> None:
        """Mounted from the first line to the last."""
        place = self._settings.mountpoint.resolve()
        kernel = self._kernel
        try:
            kernel.mount(str(self._settings.mountpoint))
        except RuntimeError as error:
            raise MountFailed(
                f"{self._settings.mountpoint} could not be mounted ({error}); "
                "'hpcfs check' finds out why"
            ) from None
        try:
            async with trio.open_nursery() as nursery:
                services = Services(nursery, self._mount.store.troubles)
                if self._owner is None:
                    services.keep_running("waiting for signals", self._stop_on_signal)
                else:
                    services.keep_running("waiting for the end", self._stop_with, self._owner)
                nursery.start_soon(self._get_ready)
                services.keep_running(
                    "looking at the mount", self._end_when_unmounted, place, nursery.cancel_scope
                )
                await kernel.serve(MAX_KERNEL_REQUESTS)
                nursery.cancel_scope.cancel()
        finally:
            kernel.unmount()

    async def _end_when_unmounted(self, place: Path, serving: trio.CancelScope) -> None:
        """End the serving once the mount is gone.

        Nobody waits for answers then, but a request may still wait for a dead link, and another
        mount namespace (a container) may hold what the user took away.
        """
        with mountinfo.watched() as wait_for_change:
            while mountinfo.at(place, mountpoint.mounts()):
                await trio.to_thread.run_sync(
                    wait_for_change, LONGEST_UNCHECKED_SECONDS, abandon_on_cancel=True
                )
                await trio.sleep(UNMOUNT_CHECK_SECONDS)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._let_go)
            await trio.sleep(UNMOUNT_PATIENCE)
        log.info("unmounted; %d files were still open", self._mount.fs.files.open_count)
        serving.cancel()

    async def _stop_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                log.info("%s: unmounting", signal.Signals(number).name)
                await self._stop()

    async def _stop_with(self, owner: int) -> None:
        await trio.lowlevel.wait_readable(owner)  # nothing is ever written: it is closed
        log.info("who asked for the mount has ended: unmounting")
        await self._stop()

    async def _stop(self) -> None:
        try:
            await self._let_go()
            await self._mount.fs.closer.flush_all()
        finally:
            self._kernel.stop()

    async def _let_go(self) -> int:
        return await let_go(self._kernel.requests, self._mount.fs.closer)

    async def _get_ready(self) -> None:
        """The first logins, all sites at once; a site out of reach stops nobody."""
        async with trio.open_nursery() as nursery:
            for namespace in self._mount.namespaces:
                nursery.start_soon(self._connect, namespace)
        self._questions.end()
        if self._owner is not None:
            signals.outlive_job()
        log.info("mounted at %s", self._settings.mountpoint)
        self._on_ready(self._status.status())

    async def _connect(self, namespace: Namespace) -> None:
        try:
            await namespace.capabilities()
        except RemoteError as error:
            log.warning("namespace %s: %s", namespace.name, error.message)

    # --- services ---------------------------------------------------------------------------------

    async def _save_forever(self) -> None:
        while True:
            await trio.sleep(SAVE_SECONDS)
            await renew_if_removed(self._mount.store)
            await self._mount.journal.renew_if_removed()
            await self._mount.fs.closer.note_dirty()
            await self._mount.journal.sync()
            await self._mount.store.save()

    async def _answer(
        self, request: control.ControlRequest, tell: control_server.ReportProgress
    ) -> control.ControlReply:
        if request.command == "let_go":
            return control.ControlReply(outcome=control.Outcome(await self._let_go()))
        if request.command in control.WRITE_COMMANDS:
            return await self._writes.answer(request, tell)
        return await self._cache.answer(request, tell)
