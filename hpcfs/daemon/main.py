"""The mount daemon: builds everything, mounts, serves, unmounts. The only place that assembles.

Order matters at both ends. At the start: the cache's lock, then the mount, then the first logins
(with the terminal to ask questions), then `on_ready`. At the end: no more kernel requests, then
what is dirty goes to the remotes or is kept, then the cache's index, then the lock.
"""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

import msgspec
import trio

from hpcfs import __version__
from hpcfs.cache.store import CacheUnusable, Store
from hpcfs.config.config import Settings
from hpcfs.control import control, mountpoint, server as control_server
from hpcfs.daemon.cache_commands import CacheCommands
from hpcfs.daemon.write_commands import WriteCommands
from hpcfs.filesystem.filesystem import Filesystem, MountOptions
from hpcfs.kernel import operations as kernel
from hpcfs.model.errors import RemoteError, SetupError
from hpcfs.model.sites import (
    AnyRoot,
    AnySite,
    S3Root,
    S3Site,
    SftpRoot,
    SiteSpec,
    SshSite,
    TunnelSite,
)
from hpcfs.model.usage import Traffic
from hpcfs.protocol.messages import Start
from hpcfs.site.bandwidth import Bandwidth
from hpcfs.site.client import Ask, SiteClient
from hpcfs.site.namespace import Namespace
from hpcfs.system import dumps, logs, mountinfo, signals
from hpcfs.writeback.journal import Journal
from hpcfs.writeback.pending import Pending
from hpcfs.writeback.recovery import Recovery
from hpcfs.writeback.uploader import Uploader

log = logging.getLogger(__name__)

OnReady = Callable[[control.MountStatus], None]

SAVE_SECONDS = 2.0
"""How far the cache's index may lag behind; a killed daemon's last blocks are fetched again."""
MAX_KERNEL_REQUESTS = 512
"""A dead namespace can't use these up before its requests fail."""
_KINDS = {SshSite: "sftp", S3Site: "s3", TunnelSite: "tunnel"}
DECISION = "(yes/no"
"""In the questions about host keys, ours and those of `ssh`; they name host and fingerprint."""
UNMOUNT_CHECK_SECONDS = 1.0
UNMOUNT_PATIENCE = 3.0
"""What the kernel's last requests may take after an unmount, before they are cancelled."""


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


class Questions:
    """All sites' questions, one after the other. What the user decides about a host key holds for
    each site that shows the same key of the same host, such as a jump host of several."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._decided: dict[str, str] = {}

    def ask(self, text: str, echo: bool) -> str | None:
        with self._lock:
            if text in self._decided:
                return self._decided[text]
            answer = self._ask(text, echo)
            if answer and echo and _is_decision(text):  # nothing else that is typed is kept
                self._decided[text] = answer
            return answer


def _is_decision(text: str) -> bool:
    """What a server asks begins with "(user@host)"."""
    return DECISION in text and not text.startswith("(")


class _Daemon:
    def __init__(self, settings: Settings, ask: Ask, on_ready: OnReady, owner: int | None) -> None:
        self._settings = settings
        self._owner = owner
        self._ask = ask
        self._on_ready = on_ready
        self._started = time.time()
        self._sites: dict[AnySite, SiteClient] = {}
        self._namespaces: list[Namespace] = []
        self._store: Store
        self._journal: Journal
        self._fs: Filesystem
        self._cache: CacheCommands
        self._writes: WriteCommands
        self._resumed_files = 0
        self._recovery: Recovery
        self._pending: Pending

    # --- from start to end ----------------------------------------------------------------------

    async def run(self) -> None:
        async with AsyncExitStack() as stack:
            await self._open_cache(stack)
            services = await stack.enter_async_context(trio.open_nursery())
            stack.callback(services.cancel_scope.cancel)
            self._build(services)
            self._cache = CacheCommands(
                self._settings, self._store, self._fs, {n.name: n.origin for n in self._namespaces}
            )
            self._writes = WriteCommands(self._settings, self._pending)
            await services.start(
                control_server.serve, self._settings.socket, self._live_status, self._answer
            )
            await self._take_up()
            services.start_soon(self._store.evict_forever)
            services.start_soon(self._fs.closer.queue.run)
            services.start_soon(self._save_forever)
            services.start_soon(self._remove_strays)
            await self._serve_kernel()
            log.info("unmounted; finishing what is open")
            await self._fs.files.close_all()
            await self._fs.closer.queue.drain()

    async def _open_cache(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        holder = f"the mount at {settings.mountpoint} (pid {os.getpid()})"
        try:
            self._store = Store.open(
                settings.cache_dir, settings.cache_size, holder, settings.cache_min_free
            )
            stack.push_async_callback(self._close_store)
            self._journal = Journal.open(settings.cache_dir)
            stack.push_async_callback(self._journal.close)
        except CacheUnusable as error:
            raise MountFailed(str(error)) from None
        except (OSError, sqlite3.Error) as error:
            raise MountFailed(
                f"the cache directory {settings.cache_dir} can't be used: {error}"
            ) from None

    async def _take_up(self) -> None:
        """What an earlier mount had not uploaded."""
        try:
            count = self._resumed_files = await self._recovery.restore(self._journal.rows)
        except (OSError, sqlite3.Error) as error:
            raise MountFailed(
                f"what an earlier mount left in {self._settings.cache_dir} can't be read: {error}"
            ) from None
        if count:
            log.info("%d files that an earlier mount had not uploaded are uploaded now", count)

    async def _close_store(self) -> None:
        with trio.CancelScope(shield=True):
            try:
                await self._store.close()
            except (OSError, sqlite3.Error) as error:
                log.error("the cache's index could not be saved: %s", error)  # noqa: TRY400

    def _build(self, services: trio.Nursery) -> None:
        settings = self._settings
        links: dict[AnySite, Bandwidth] = {}
        for spec in _site_specs(settings):
            self._sites[spec.site] = SiteClient(
                Start(spec, settings.log_level),
                settings.log_file,
                services,
                self._store.in_memory,
            )
            links[spec.site] = Bandwidth()
        for chosen in settings.namespaces.values():
            origin = _origin(chosen.site, chosen.root)
            site = self._sites[chosen.site]
            self._namespaces.append(
                Namespace(
                    chosen.name,
                    origin,
                    site,
                    links[chosen.site],
                    read_only=chosen.read_only,
                    write=chosen.write,
                    keeps_xattrs=chosen.keeps_xattrs,
                    sleeps=isinstance(chosen.site, TunnelSite),
                    symlinks=chosen.symlinks,
                )
            )
        self._fs = Filesystem(
            self._namespaces,
            self._store,
            Uploader(self._journal),
            services,
            MountOptions(
                single=settings.root_namespace is not None,
                mountpoint=os.fsencode(settings.mountpoint),
                journal_size=settings.journal_size,
            ),
        )
        tree, closer = self._fs.tree, self._fs.closer
        self._recovery = Recovery(
            tree, self._fs.shared, closer.queue, self._journal, self._namespaces
        )
        self._pending = Pending(tree, self._store, closer, self._journal, self._recovery)

    async def _serve_kernel(self) -> None:
        """Mounted from the first line to the last."""
        place = self._settings.mountpoint.resolve()
        try:
            kernel.mount(self._fs, str(self._settings.mountpoint))
        except RuntimeError as error:
            raise MountFailed(
                f"{self._settings.mountpoint} could not be mounted ({error}); "
                "'hpcfs check' finds out why"
            ) from None
        try:
            async with trio.open_nursery() as nursery:
                if self._owner is None:
                    nursery.start_soon(self._stop_on_signal)
                else:
                    nursery.start_soon(self._stop_with, self._owner)
                nursery.start_soon(self._get_ready)
                nursery.start_soon(self._end_when_unmounted, place, nursery.cancel_scope)
                await kernel.serve(MAX_KERNEL_REQUESTS)
                nursery.cancel_scope.cancel()
        finally:
            kernel.unmount()

    async def _end_when_unmounted(self, place: Path, serving: trio.CancelScope) -> None:
        """Once unmounted nobody waits for answers, but a request may still wait for a dead link;
        and another mount namespace (a container) may hold what the user took away."""
        while mountinfo.at(place, mountpoint.mounts()):  # noqa: ASYNC110 - nobody tells of it
            await trio.sleep(UNMOUNT_CHECK_SECONDS)
        await trio.sleep(UNMOUNT_PATIENCE)
        log.info("unmounted; %d files were still open", self._fs.files.open_count)
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
        await self._fs.closer.flush_all()
        kernel.stop()

    async def _get_ready(self) -> None:
        """The first logins, all sites at once; a site out of reach stops nobody."""
        questions = Questions(self._ask)
        for site in self._sites.values():
            site.ask = questions.ask
        async with trio.open_nursery() as nursery:
            for namespace in self._namespaces:
                nursery.start_soon(self._connect, namespace)
        for site in self._sites.values():
            site.ask = None
        if self._owner is not None:
            signals.outlive_job()
        log.info("mounted at %s", self._settings.mountpoint)
        self._on_ready(self.status())

    async def _connect(self, namespace: Namespace) -> None:
        try:
            await namespace.capabilities()
        except RemoteError as error:
            log.warning("namespace %s: %s", namespace.name, error.message)

    # --- services ---------------------------------------------------------------------------------

    async def _save_forever(self) -> None:
        failing = False
        while True:
            await trio.sleep(SAVE_SECONDS)
            try:
                await self._fs.closer.note_dirty()
                await self._journal.sync()
                await self._store.save()
            except (OSError, sqlite3.Error) as error:
                if not failing:
                    log.error("the cache's index can't be saved: %s", error)  # noqa: TRY400
                failing = True
            else:
                failing = False

    async def _remove_strays(self) -> None:
        try:
            await self._store.remove_strays()
        except OSError as error:
            log.warning("old cache files could not be removed: %s", error)

    async def _answer(
        self, request: control.ControlRequest, tell: control_server.ReportProgress
    ) -> control.ControlReply:
        if request.command in control.WRITE_COMMANDS:
            return await self._writes.answer(request, tell)
        return await self._cache.answer(request, tell)

    # --- status -----------------------------------------------------------------------------------

    def status(self) -> control.MountStatus:
        settings = self._settings
        pending = self._writes.summary()
        return control.MountStatus(
            mountpoint=str(settings.mountpoint),
            pid=os.getpid(),
            version=__version__,
            started=self._started,
            log_file=str(settings.log_file),
            cache_dir=str(settings.cache_dir),
            cache_used=self._store.used_bytes,
            cache_size=settings.cache_size,
            open_files=self._fs.files.open_count,
            dirty_files=len(self._fs.closer.dirty()),
            namespaces=[self._namespace_status(name) for name in settings.namespaces],
            pending=pending.files,
            pending_files=pending.count,
            pending_bytes=pending.left,
            pending_states=pending.states,
            uploaded_bytes=sum(namespace.uploaded.total for namespace in self._namespaces),
            upload_rate=sum(namespace.uploaded.rate() for namespace in self._namespaces),
            memory=self._memory(),
            notices=list(self._fs.closer.notices),
            resumed_files=self._resumed_files,
            root_namespace=settings.root_namespace,
        )

    async def _live_status(self) -> control.MountStatus:
        """With what only the transfer processes know."""
        found: dict[AnySite, Traffic] = {}

        async def ask(key: AnySite, site: SiteClient) -> None:
            traffic = await site.traffic()
            if traffic is not None:
                found[key] = traffic

        async with trio.open_nursery() as nursery:
            for key, site in self._sites.items():
                nursery.start_soon(ask, key, site)
        sites = [self._site_status(key, found[key]) for key in self._sites if key in found]
        return msgspec.structs.replace(self.status(), sites=sites)

    def _site_status(self, key: AnySite, now: Traffic) -> control.SiteStatus:
        names = [name for name, chosen in self._settings.namespaces.items() if chosen.site == key]
        return control.SiteStatus(
            names, _KINDS[type(key)], now.connections, now.channels, now.requests
        )

    def _namespace_status(self, name: str) -> control.NamespaceStatus:
        chosen = self._settings.namespaces[name]
        site = self._sites[chosen.site]
        state, reason = site.namespace_state(name)
        return control.NamespaceStatus(
            name,
            _KINDS[type(chosen.site)],
            chosen.url,
            state,
            reason,
            chosen.read_only,
            chosen.write,
        )

    def _memory(self) -> int:
        """Resident bytes of the daemon and its transfer processes."""
        pids = [os.getpid(), *(site.pid for site in self._sites.values() if site.pid)]
        return sum(_resident_bytes(pid) for pid in pids)


def _resident_bytes(pid: int) -> int:
    """proc_pid_statm(5): the second number, in pages."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0  # it just ended
    return pages * os.sysconf("SC_PAGE_SIZE")


def _site_specs(settings: Settings) -> list[SiteSpec]:
    """One for each login; namespaces of one site share its connection."""
    roots: dict[AnySite, dict[str, AnyRoot]] = {}
    for namespace in settings.namespaces.values():
        roots.setdefault(namespace.site, {})[namespace.name] = namespace.root
    make = partial(
        SiteSpec,
        state_dir=str(settings.cache_dir),
        uid=os.getuid(),
        gid=os.getgid(),
    )
    return [make(site=site, roots=its_roots) for site, its_roots in roots.items()]


def _origin(site: AnySite, root: AnyRoot) -> str:
    """Names a remote folder across mounts, whatever the namespace is called."""
    if isinstance(site, SshSite) and isinstance(root, SftpRoot):
        return f"ssh:{site.user or ''}@{site.host}:{site.port or ''}:{root.path}"
    if isinstance(site, TunnelSite) and isinstance(root, SftpRoot):
        return f"tunnel:{site.name}:{root.path}"
    assert isinstance(site, S3Site)
    assert isinstance(root, S3Root)
    return f"s3:{site.endpoint_url or 'aws'}:{root.bucket}/{root.prefix}"
