"""Servers that grant few open files: OpenSSH's under a low ulimit, and one that counts them all."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from hpcfs.laptop.acceptor import EndpointKind
from hpcfs.laptop.shares import Share
from hpcfs.model.errors import NotSupported, PiecesLost, RemoteFailure
from hpcfs.model.sites import SiteSpec
from hpcfs.model.uploads import PIECE_BYTES
from hpcfs.remotes.sftp.parallel_channels import WIDE_BYTES
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from hpcfs.remotes.tunnel.site import TunnelSiteConnection
from tests.remotes.contract import get, listed, put, put_ahead
from tests.support.evil_sftp import EvilSite, Plain, evil_site
from tests.support.laptop import laptop
from tests.support.sshd import ScriptedPrompter, sftp_server_binary, ssh_server

FEW = 16
MANY = 3 * FEW
Story = Callable[[SftpRemote, Path], Awaitable[None]]


def on_few(base: Path, story: Story, transport: str = "asyncssh") -> None:
    """On an sftp-server of which each process may have FEW descriptors, its own among them."""
    base.mkdir(exist_ok=True)
    server = base / "sftp-server"
    server.write_text(f"#!/bin/sh\nulimit -n {FEW}\nexec {sftp_server_binary()}\n")
    server.chmod(0o755)

    async def main() -> None:
        spec = sshd.site_spec(site=sshd.site(transport=transport))
        site = SshSiteConnection(spec, ScriptedPrompter())
        try:
            async with asyncio.timeout(60):
                await story(site.remote("ns"), sshd.root)
        finally:
            await site.close()

    with ssh_server(base / "sshd", subsystem=str(server)) as sshd:
        asyncio.run(main())


async def read_all(remote: SftpRemote, folder: Path, first_handle: int) -> None:
    """More files than are granted, each with a reader that stays."""
    for number in range(MANY):
        (folder / f"in{number}").write_bytes(b"%d" % number)
    for number in range(MANY):
        entry = await remote.stat(b"in%d" % number)
        handle = first_handle + number
        got = await remote.fetch(b"in%d" % number, entry.version, 0, entry.size, handle)
        assert b"".join(got) == b"%d" % number


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
def test_more_readers_than_handles(tmp_path: Path, transport: str) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        await read_all(remote, folder, 1000)
        for number in reversed(range(MANY)):  # once more by the same readers
            entry = await remote.stat(b"in%d" % number)
            got = await remote.fetch(b"in%d" % number, entry.version, 0, 1, 1000 + number)
            assert b"".join(got) == b"%d" % (number // 10 or number)
        for number in range(MANY):
            await remote.release(1000 + number)

    on_few(tmp_path, story, transport)


def test_what_else_needs_a_handle_while_readers_have_all(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, folder: Path) -> None:
        await read_all(remote, folder, 1000)
        await put(remote, b"new", b"x")
        await remote.create(b"made", 0o644)
        await put(remote, b"in1", b"changed", base_version=(await remote.stat(b"in1")).version)
        await put(remote, b"in2", b"replaced", replace=True)
        assert len(await listed(remote, b"")) == MANY + 2
        assert await get(remote, b"in1") == b"changed"
        assert await get(remote, b"in2") == b"replaced"
        large = random.Random(1).randbytes(WIDE_BYTES)
        await put(remote, b"large", large)
        assert (folder / "large").read_bytes() == large
        (folder / "d" / "e").mkdir(parents=True)
        await remote.remove_directory(b"d/e")

    on_few(tmp_path, story)


def test_more_new_files_than_handles(tmp_path: Path) -> None:
    """They are held open until they are uploaded."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        for number in range(MANY):
            await remote.create(b"new%d" % number, 0o644, 1 + number)
        for number in range(MANY):
            await put(remote, b"new%d" % number, b"%d" % number, handle=1 + number)
        for number in range(MANY):
            assert (folder / f"new{number}").read_bytes() == b"%d" % number

    on_few(tmp_path, story)


def test_more_at_once_than_handles(tmp_path: Path) -> None:
    """All wait their turn; nothing is refused."""

    async def story(remote: SftpRemote, folder: Path) -> None:
        for number in range(MANY):
            (folder / f"d{number}").mkdir()
            (folder / f"d{number}" / "f").touch()
            (folder / f"in{number}").write_bytes(b"%d" % number)
        await asyncio.gather(
            *(put(remote, b"up%d" % number, b"%d" % number) for number in range(MANY)),
            *(get(remote, b"in%d" % number, 1000 + number) for number in range(MANY)),
            *(listed(remote, b"d%d" % number) for number in range(MANY)),
            *(put(remote, b"l%d" % number, bytes(2_000_000)) for number in range(MANY)),
        )
        for number in range(MANY):
            assert (folder / f"up{number}").read_bytes() == b"%d" % number
            assert (folder / f"l{number}").stat().st_size == 2_000_000

    on_few(tmp_path, story)


def test_more_files_sent_ahead_than_handles(tmp_path: Path) -> None:
    """What loses its handle is sent again, as after a lost connection."""
    piece = bytes(range(256)) * (PIECE_BYTES // 256)

    async def story(remote: SftpRemote, folder: Path) -> None:
        async def bring(number: int) -> None:
            name, sent = b"f%d" % number, True
            try:
                await put_ahead(remote, name, piece, 0, 1 + number, base_version=b"")
            except NotSupported:
                sent = False
            try:
                rest = [(PIECE_BYTES, 3)] if sent else None
                await put(remote, name, piece + b"end", ranges=rest, handle=1 + number)
            except PiecesLost:
                await put(remote, name, piece + b"end")

        for number in range(6):
            await put_ahead(remote, b"x%d" % number, piece, 0, 1000 + number, base_version=b"")
        await read_all(remote, folder, 5000)
        for number in range(4):
            await bring(number)
            assert (folder / f"f{number}").read_bytes() == piece + b"end"

    on_few(tmp_path, story)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_laptop_that_grants_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: EndpointKind
) -> None:
    """Its own bound, or its system's: macOS gives a process 256."""
    monkeypatch.setattr("hpcfs.laptop.sftp_server.MAX_OPEN_FILES", FEW)
    folder = tmp_path / "data"
    folder.mkdir()

    async def main(spec: SiteSpec) -> None:
        site = TunnelSiteConnection(spec)
        remote = site.remote("ns")
        try:
            async with asyncio.timeout(60):
                await read_all(remote, folder, 1000)
                for number in range(MANY):
                    await remote.create(b"new%d" % number, 0o644, 1 + number)
                await asyncio.gather(
                    *(put(remote, b"new%d" % n, b"x", handle=1 + n) for n in range(MANY)),
                    *(listed(remote, b"") for _ in range(MANY)),
                )
                assert len(await listed(remote, b"")) == 2 * MANY
        finally:
            await site.close()

    with laptop(tmp_path, Share("data", folder), kind=kind) as running:
        asyncio.run(main(running.site_spec("/data", tmp_path)))
    for number in range(MANY):
        assert (folder / f"new{number}").read_bytes() == b"x"


# --- a server that counts -------------------------------------------------------------------------


class Few(Plain):
    """Grants FEW handles to all channels together, and remembers the most that were open."""

    held = 0
    refused = 0

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        if Few.held >= FEW:
            Few.refused += 1
            raise asyncssh.SFTPFailure("Failure")
        opened = super().open(path, pflags, attrs)
        Few.held += 1
        return opened

    def close(self, file_obj: Any) -> None:
        Few.held -= 1
        super().close(file_obj)


class Full(Few):
    """And can't make files in "full", which it does not explain."""

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        if path.startswith(b"/full/") and pflags & asyncssh.FXF_CREAT:
            raise asyncssh.SFTPFailure("Failure")
        return super().open(path, pflags, attrs)


def on_counting(
    base: Path, sftp: type[Few], story: Callable[[SftpRemote, EvilSite], Awaitable[None]]
) -> None:
    async def main() -> None:
        Few.held = Few.refused = 0
        async with asyncio.timeout(60), evil_site(base, sftp) as evil:
            site = SshSiteConnection(evil.spec, ScriptedPrompter())
            try:
                await story(site.remote("ns"), evil)
            finally:
                await site.close()

    asyncio.run(main())


def test_the_limit_is_found_out_once(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        await read_all(remote, evil.directory, 1000)
        await put(remote, b"new", b"x")
        assert Few.refused == 2  # what was wanted, and one that could be opened a moment before
        for number in range(MANY):
            await remote.release(1000 + number)
        await remote.stat(b"new")
        await get(remote, b"new")

    on_counting(tmp_path, Few, story)
    assert Few.held == 0


@pytest.mark.parametrize("full", [True, False])
def test_other_failures_give_nothing_up(tmp_path: Path, full: bool) -> None:
    """A reader's handle is what keeps a replaced file readable."""

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "full").mkdir()
        for number in range(4):
            (evil.directory / f"in{number}").write_bytes(b"old bytes")
            entry = await remote.stat(b"in%d" % number)
            await remote.fetch(b"in%d" % number, entry.version, 0, 1, 1000 + number)
        for _ in range(3):
            with pytest.raises(RemoteFailure if full else Exception):
                await remote.create(b"full/new" if full else b"in1", 0o644)
        for number in range(4):
            (evil.directory / f"in{number}").rename(evil.directory / "gone")
            assert await remote.stat_open(1000 + number) is not None

    on_counting(tmp_path, Full, story)
