"""Symbolic links over SFTP, whose requests servers read in two ways, whatever their banners say."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncssh
import pytest

from hpcfs.model.errors import AlreadyExists, NotADirectory, NotFound, RemoteError, RemoteFailure
from hpcfs.model.sites import SftpRoot, SiteSpec
from hpcfs.remotes.sftp.remote import SftpRemote
from hpcfs.remotes.sftp.site import SshSiteConnection
from tests.support.evil_sftp import (
    EvilSite,
    NoLinks,
    Plain,
    TargetFirst,
    VagueLinkFirst,
    VagueTargetFirst,
    evil_site,
)
from tests.support.roundtrips import counting
from tests.support.sshd import ScriptedPrompter, sftp_server_binary

BANNERS = ("OpenSSH_9.9", "dropbear_2022.83", "mod_sftp", "Go", "paramiko_3.4", None)
ORDERS = (TargetFirst, Plain, VagueTargetFirst, VagueLinkFirst)
Story = Callable[[SftpRemote, EvilSite], Awaitable[None]]


def on_server(base: Path, sftp: type[Plain], story: Story, version: str | None = None) -> None:
    async def main() -> None:
        async with asyncio.timeout(60), evil_site(base, sftp, version=version) as evil:
            site = SshSiteConnection(evil.spec, ScriptedPrompter())
            try:
                await story(site.remote("ns"), evil)
            finally:
                await site.close()

    asyncio.run(main())


def links_below(directory: Path) -> dict[str, str]:
    found = (place for place in directory.rglob("*") if place.is_symlink())
    return {str(place.relative_to(directory)): os.readlink(place) for place in found}


@pytest.mark.parametrize("version", BANNERS)
@pytest.mark.parametrize("sftp", ORDERS)
def test_links_are_made_where_they_should_be_and_nowhere_else(
    tmp_path: Path, sftp: type[Plain], version: str | None
) -> None:
    """A target that could be made as a link, and one that is there: both would be strays."""

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "data.csv").write_bytes(b"x")
        (evil.directory / "d").mkdir()
        await remote.make_symlink(b"latest", b"data.csv")
        await remote.make_symlink(b"d/results", b"/d/far")
        await remote.make_symlink(b"d/new", b"fresh")
        wanted = {"latest": "data.csv", "d/results": "/d/far", "d/new": "fresh"}
        assert links_below(evil.directory) == wanted
        assert sorted(os.listdir(evil.directory)) == ["d", "data.csv", "latest"]
        assert await remote.read_link(b"d/results") == b"/d/far"

    on_server(tmp_path, sftp, story, version)


@pytest.mark.parametrize("sftp", [TargetFirst, Plain])
def test_the_order_is_looked_for_without_making_anything(tmp_path: Path, sftp: type[Plain]) -> None:
    """What the server makes on the way would be seen, and would stay if it ended just then."""
    made: list[bytes] = []

    class Watched(sftp):  # type: ignore[valid-type,misc]
        def symlink(self, oldpath: bytes, newpath: bytes) -> None:
            super().symlink(oldpath, newpath)
            made.append(oldpath + newpath)

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        await remote.make_symlink(b"one", b"target")
        await remote.make_symlink(b"two", b"target")
        assert len(made) == 2
        assert b"hpcfs" not in b"".join(made)

    on_server(tmp_path, Watched, story)


@pytest.mark.parametrize("sftp", ORDERS)
def test_what_stands_in_the_way_of_a_link_is_told(tmp_path: Path, sftp: type[Plain]) -> None:
    refusals: dict[bytes, type[RemoteError]] = {
        b"taken": AlreadyExists,
        b"none/link": NotFound,
        b"taken/link": NotADirectory,
    }

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "taken").write_bytes(b"x")
        for path, refusal in refusals.items():
            if refusal is not AlreadyExists and sftp in (VagueLinkFirst, VagueTargetFirst):
                refusal = RemoteError
            with pytest.raises(refusal):
                await remote.make_symlink(path, b"target")
        assert os.listdir(evil.directory) == ["taken"]

    on_server(tmp_path, sftp, story)


def test_a_server_that_makes_no_links_is_told_so(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        with pytest.raises(RemoteFailure):
            await remote.make_symlink(b"link", b"target")
        assert os.listdir(evil.directory) == []

    on_server(tmp_path, NoLinks, story)


def test_the_order_is_looked_for_once_per_connection(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        session = (await remote._place(b"")).session
        await remote.make_directory(b"first", 0o755)  # which tells whose the login is
        with counting(session) as counter:
            trips = []
            for number in range(3):
                counter.restart()
                await remote.make_symlink(b"l%d" % number, b"target")
                trips.append(counter.reached)
        assert trips == [2, 1, 1]

    on_server(tmp_path, TargetFirst, story)


# --- OpenSSH's own server behind another banner, as Dropbear runs it ------------------------------


class Piped(asyncssh.SSHServerSession[bytes]):
    """Joins a channel to a child that speaks SFTP."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._early: list[bytes] = []
        self._child: asyncio.subprocess.Process | None = None

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._chan = chan

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == "sftp"

    def session_started(self) -> None:
        self.pumping = asyncio.ensure_future(self._pump())

    async def _pump(self) -> None:
        pipe = asyncio.subprocess.PIPE
        child = await asyncio.create_subprocess_exec(
            sftp_server_binary(), cwd=self._home, stdin=pipe, stdout=pipe
        )
        assert child.stdin is not None
        assert child.stdout is not None
        self._child = child
        child.stdin.writelines(self._early)
        while data := await child.stdout.read(65536):
            self._chan.write(data)
        await child.wait()

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if self._child is None or self._child.stdin is None:
            self._early.append(data)
        else:
            self._child.stdin.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()


def test_openssh_s_server_behind_another_banner(tmp_path: Path) -> None:
    """The target of a link made in the wrong order would be a link in the server's working
    directory, or wherever else it means there."""
    home, far, served = (tmp_path / name for name in ("home", "far", "served"))
    for directory in (home, far, served):
        directory.mkdir()
    sessions: list[Piped] = []

    class Server(asyncssh.SSHServer):
        def begin_auth(self, username: str) -> bool:
            return False

        def session_requested(self) -> asyncssh.SSHServerSession[bytes]:
            sessions.append(Piped(home))
            return sessions[-1]

    async def main() -> None:
        async with asyncio.timeout(60), evil_site(tmp_path / "known") as evil:
            acceptor = await asyncssh.listen(
                "127.0.0.1",
                0,
                server_host_keys=[str(evil.host_key)],
                server_factory=Server,
                server_version="dropbear_2022.83",
                encoding=None,
            )
            config = Path(evil.spec.site.ssh_config or "")  # type: ignore[union-attr]
            for file in (config, evil.known_hosts):
                file.write_text(file.read_text().replace(str(evil.port), str(acceptor.get_port())))
            spec = SiteSpec(
                evil.spec.site, {"ns": SftpRoot(str(served))}, str(tmp_path), 1000, 1000
            )
            site = SshSiteConnection(spec, ScriptedPrompter())
            remote = site.remote("ns")
            try:
                await remote.make_symlink(b"latest", b"data.csv")
                await remote.make_symlink(b"results", os.fsencode(far / "results"))
            finally:
                await site.close()
                acceptor.close()
                await acceptor.wait_closed()
                await asyncio.gather(*(session.pumping for session in sessions))

    asyncio.run(main())
    assert links_below(served) == {"latest": "data.csv", "results": str(far / "results")}
    assert [*os.listdir(home), *os.listdir(far)] == []
