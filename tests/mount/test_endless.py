"""A server whose directory never ends, in a real mount: programs can be stopped, others go on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncssh

from tests.support.evil_sftp import EvilSite, Plain, evil_site
from tests.support.mounts import OnDisk, RealHome, Served, mounted, until


class Endless(Plain):
    """Of the directory "endless"."""

    told = 0
    listings = 0

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        if path != b"/endless":
            async for name in super().scandir(path):
                yield name
            return
        Endless.listings += 1
        attrs = asyncssh.SFTPAttrs(permissions=0o100644, size=1, uid=0, gid=0, atime=1, mtime=1)
        try:
            while True:
                Endless.told += 1
                yield asyncssh.SFTPName(b"a-name-%012d" % Endless.told, b"", attrs)
                if not Endless.told % 1000:
                    await asyncio.sleep(0)
        finally:
            Endless.listings -= 1


@contextmanager
def endless(base: Path) -> Iterator[EvilSite]:
    """In a thread: the mount is used by this one."""
    ready: list[EvilSite] = []
    loop = asyncio.new_event_loop()
    over = asyncio.Event()

    async def serve() -> None:
        async with evil_site(base, Endless) as evil:
            ready.append(evil)
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=[serve()])
    thread.start()
    try:
        yield until(lambda: ready[0] if ready else None, what="a server")  # type: ignore[misc]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)
        loop.close()


def test_a_program_in_an_endless_directory_can_be_stopped(
    real_home: RealHome, tmp_path: Path
) -> None:
    with endless(tmp_path / "server") as evil:
        (evil.directory / "endless").mkdir()
        (evil.directory / "file").write_bytes(b"content")
        config = evil.spec.site.ssh_config  # type: ignore[union-attr]
        keys: dict[str, str | bool | float] = {"type": "sftp", "host": "cluster", "path": "/"}
        served = Served("sftp", {**keys, "ssh_config": str(config)}, OnDisk(evil.directory))
        with mounted(real_home, {"ns": served}) as mount:
            place = mount.path / "ns"
            with (tmp_path / "listed").open("wb") as listed:
                reader = subprocess.Popen(["ls", "-f", place / "endless"], stdout=listed)
                until(lambda: Endless.told > 40_000, what="a listing that goes on")
                assert (place / "file").read_bytes() == b"content"
                began = time.monotonic()
                os.kill(reader.pid, signal.SIGINT)
                reader.wait(timeout=10)
            assert time.monotonic() - began < 5
            until(lambda: not Endless.listings, what="the server hears of the end")
            told = Endless.told
            assert sorted(os.listdir(place)) == ["endless", "file"]
            assert Endless.told - told < 50_000
