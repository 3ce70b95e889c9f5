"""A daemon with the API of hpcfs.daemon.main over an empty filesystem, to test what surrounds it.

It mounts for real and answers on the real control socket, but reaches no remote. What it does at
start-up is set by HPCFS_STUB: fine, failed (one namespace), refused (MountFailed), crash, ask,
hang (until a signal ends it). What is not uploaded is set by HPCFS_STUB_PENDING, a JSON list of the
arguments of tests.support.backlog.row, and HPCFS_STUB_RATE, bytes uploaded a second, which with
HPCFS_STUB_WAITS begins when somebody syncs; files named in HPCFS_STUB_REFUSES, a JSON object of
reasons by id, fail. It ends when nothing is on its way any more. Run as a program it stands in for
`hpcfs` with this daemon.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pyfuse3
import trio

import hpcfs
from hpcfs.config.config import Settings
from hpcfs.control import server as control_server
from hpcfs.control.control import MountStatus, NamespaceStatus
from hpcfs.daemon.write_commands import SyncProgress, WriteCommands, summary
from hpcfs.model.errors import RemoteError
from tests.support.backlog import FakeBacklog, row

FILE_INODE = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)


class MountFailed(Exception):
    pass


class OneFile(pyfuse3.Operations):
    """A root with one empty file, named "file"."""

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.attr_timeout = entry.entry_timeout = 300  # long, so that a dead mount has cached ones
        entry.st_mode = pyfuse3.ModeT(
            stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        )
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def lookup(
        self, parent: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != b"file":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE_INODE)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode))

    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        return pyfuse3.FileHandleT(inode)

    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        if start_id == 0:
            attributes = await self.getattr(FILE_INODE)
            pyfuse3.readdir_reply(token, pyfuse3.FileNameT(b"file"), attributes, 1)


def serve(
    settings: Settings,
    *,
    ask: Callable[[str, bool], str | None],
    on_ready: Callable[[MountStatus], None],
    foreground: bool,
    owner: int | None = None,
) -> None:
    assert owner is None  # `hpcfs run` is tested with the real one
    plan = os.environ.get("HPCFS_STUB", "fine")
    if plan == "refused":
        raise MountFailed("the kernel refused the mount: try something else")
    if plan == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan == "bug":
        raise ZeroDivisionError("a bug")
    if plan == "hang":
        Path(os.environ["HPCFS_STUB_MARK"]).write_text(str(os.getpid()))
        signal.pause()
    answer = ask("Password:\x1b[2J", False) if plan == "ask" else ""
    backlog = _backlog()
    mount(
        settings,
        partial(
            report, settings, backlog, time.time(), failed=plan == "failed", reason=repr(answer)
        ),
        on_ready,
        backlog,
    )


def _backlog() -> FakeBacklog:
    rows = [row(**fields) for fields in json.loads(os.environ.get("HPCFS_STUB_PENDING", "[]"))]
    made = FakeBacklog(rows, float(os.environ.get("HPCFS_STUB_RATE", "0")))
    made.waits = "HPCFS_STUB_WAITS" in os.environ
    made.refuses = json.loads(os.environ.get("HPCFS_STUB_REFUSES", "{}"))
    return made


def report(
    settings: Settings, backlog: FakeBacklog, started: float, *, failed: bool, reason: str
) -> MountStatus:
    names = settings.namespaces
    pending = summary(backlog.pending())
    return MountStatus(
        mountpoint=str(settings.mountpoint),
        pid=os.getpid(),
        version=hpcfs.__version__,
        started=started,
        log_file=str(settings.log_file),
        cache_dir=str(settings.cache_dir),
        cache_used=2048,
        cache_size=settings.cache_size,
        open_files=0,
        dirty_files=0,
        namespaces=[
            NamespaceStatus(
                name,
                "sftp",
                found.url,
                "failed" if failed and number == 0 else "connected",
                "no route\x1b[2J to host" if failed and number == 0 else reason,
                found.read_only,
                found.write,
            )
            for number, (name, found) in enumerate(names.items())
        ],
        pending=pending.files,
        pending_files=pending.count,
        resumed_files=pending.count - pending.stuck,
        pending_bytes=pending.left,
        pending_states=pending.states,
        uploaded_bytes=backlog.uploaded,
        upload_rate=backlog.rate,
        root_namespace=settings.root_namespace,
    )


def mount(
    settings: Settings,
    status: Callable[[], MountStatus],
    on_ready: Callable[[MountStatus], None],
    backlog: FakeBacklog,
) -> None:
    options = {*pyfuse3.default_options, "fsname=hpcfs", "subtype=hpcfs"}
    options.discard("default_permissions")
    pyfuse3.init(OneFile(), str(settings.mountpoint), options)
    try:
        trio.run(_run, settings, status, on_ready, backlog)
    finally:
        pyfuse3.close(unmount=True)


async def _run(
    settings: Settings,
    status: Callable[[], MountStatus],
    on_ready: Callable[[MountStatus], None],
    backlog: FakeBacklog,
) -> None:
    service = WriteCommands(settings, backlog)

    async def told() -> MountStatus:
        return status()

    async with trio.open_nursery() as nursery:
        await nursery.start(control_server.serve, settings.socket, told, service.answer)
        nursery.start_soon(backlog.upload_forever)
        nursery.start_soon(_stop_on_signal)
        nursery.start_soon(_serve_until_unmounted, nursery.cancel_scope, backlog)
        on_ready(status())


async def _stop_on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            pyfuse3.terminate()


async def _serve_until_unmounted(scope: trio.CancelScope, backlog: FakeBacklog) -> None:
    async def ignore(progress: SyncProgress) -> None:
        pass

    await pyfuse3.main()
    with suppress(RemoteError):
        await backlog.sync(None, b"", ignore)
    scope.cancel()


if __name__ == "__main__":
    sys.modules["hpcfs.daemon.main"] = hpcfs.daemon.main = sys.modules["__main__"]  # type: ignore[attr-defined]
    from hpcfs.cli.main import main

    main()
