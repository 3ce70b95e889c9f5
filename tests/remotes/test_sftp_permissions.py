"""Who decides what new entries on an SFTP server are like, and what a server that nobody may write
to says."""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import asyncssh
import pytest
from asyncssh.constants import FXP_FSETSTAT, FXP_SETSTAT

from hpcfs.model.entries import NO_HANDLE, Attributes, Entry
from hpcfs.model.errors import NotOwner, PermissionDenied, ReadOnly, RemoteError
from hpcfs.remotes.sftp.remote import SftpRemote
from tests.remotes.contract import put
from tests.remotes.test_sftp import EXTENSIONS, on, on_evil
from tests.support import evil_sftp
from tests.support.acl import set_default_acl
from tests.support.evil_sftp import EvilSite, Plain
from tests.support.roundtrips import counting
from tests.support.sshd import SshServer, ssh_server

OTHERS = 12345


async def upload(remote: SftpRemote, path: bytes, mode: int) -> Entry:
    return await put(remote, path, b"content", mode=mode, base_version=b"")


async def replace(remote: SftpRemote, path: bytes, mode: int) -> Entry:
    await put(remote, path, b"old")
    return await put(remote, path, b"content", mode=mode, replace=True)


async def hold(remote: SftpRemote, path: bytes, mode: int) -> Entry:
    made = await remote.create(path, mode, 7)
    entry = await put(remote, path, b"content", mode=mode, handle=7)
    assert (made.mode, made.uid, made.gid) == (entry.mode, entry.uid, entry.gid)
    return entry


Make = Callable[[SftpRemote, bytes, int], Awaitable[Entry]]
FILES: dict[str, Make] = {
    "create": lambda remote, path, mode: remote.create(path, mode, NO_HANDLE),
    "create and upload": hold,
    "upload": upload,
    "replace": replace,
}
"""All ways in which a file comes to the server."""
ANYTHING: dict[str, Make] = {
    **FILES,
    "directory": lambda remote, path, mode: remote.make_directory(path, mode),
}


def made_in(sshd: SshServer, folder: Path, make: Make, mode: int) -> tuple[Entry, os.stat_result]:
    """The entry that is shown, and what there really is. No mode is set afterwards."""

    async def story(remote: SftpRemote) -> Entry:
        session = (await remote._place(b"")).session
        with counting(session) as counter:
            entry = await make(remote, b"new", mode)
            assert counter.sent[FXP_SETSTAT] == counter.sent[FXP_FSETSTAT] == 0
        assert (await remote.stat(b"new")).mode == entry.mode
        return entry

    entry = on(sshd.site_spec(str(folder)), story)
    return entry, (folder / "new").stat()


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING)
def test_the_umask_of_the_server_counts(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with ssh_server(tmp_path / "server", subsystem="internal-sftp -u 0027") as server:
        entry, found = made_in(server, folder, make, 0o777)
    assert entry.mode == found.st_mode
    assert stat.S_IMODE(found.st_mode) == 0o750


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING)
def test_default_access_lists_of_the_server_count(
    make: Make, sshd: SshServer, tmp_path: Path
) -> None:
    set_default_acl(tmp_path, 7, 7, 0)
    entry, found = made_in(sshd, tmp_path, make, 0o777)
    assert entry.mode == found.st_mode
    assert stat.S_IMODE(found.st_mode) == 0o770, "group: not even the server's umask of 022"


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING)
def test_groups_of_directories_are_inherited(make: Make, sshd: SshServer, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    if not os.getuid():
        os.chown(folder, -1, OTHERS)
    folder.chmod(0o2775)
    entry, found = made_in(sshd, folder, make, 0o755)
    assert found.st_gid == folder.stat().st_gid
    assert entry.mode == found.st_mode
    assert bool(found.st_mode & stat.S_ISGID) == stat.S_ISDIR(found.st_mode)
    if not os.getuid():
        assert entry.gid == OTHERS


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_a_mode_that_a_program_set_is_set(make: Make, sshd: SshServer, tmp_path: Path) -> None:
    """chmod(2) of a new file, which comes with its upload."""
    set_default_acl(tmp_path, 7, 5, 0)

    async def story(remote: SftpRemote) -> Entry:
        await make(remote, b"new", 0o600)
        return await put(remote, b"new", b"x", attributes=Attributes(mode=0o664))

    assert stat.S_IMODE(on(sshd.site_spec(str(tmp_path)), story).mode) == 0o664
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o664


class Modeless(Plain):
    """Makes everything readable by all, whatever it is asked for."""

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        return super().open(path, pflags, asyncssh.SFTPAttrs(permissions=0o644))

    def mkdir(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
        super().mkdir(path, asyncssh.SFTPAttrs(permissions=0o755))


@pytest.mark.parametrize("make", ANYTHING.values(), ids=ANYTHING)
def test_what_is_made_for_its_owner_alone_is_private_everywhere(make: Make, tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        entry = await make(remote, b"new", 0o700)
        found = (evil.directory / "new").stat()
        assert entry.mode == found.st_mode
        assert not found.st_mode & 0o077
        assert stat.S_IMODE((await make(remote, b"other", 0o640)).mode) in (0o644, 0o755)

    on_evil(tmp_path, Modeless, story)


def test_a_mode_set_after_creation_is_not_overtaken(tmp_path: Path) -> None:
    """What makes it private goes another way than a later mode."""

    async def story(remote: SftpRemote, _: EvilSite) -> None:
        for number in range(1, 40):
            name = b"%d" % number
            await remote.create(name, 0o600, number)
            assert stat.S_IMODE((await remote.stat(name)).mode) == 0o600
            await remote.set_attributes(name, Attributes(mode=0o440))
            entry = await put(remote, name, b"x", base_version=b"", handle=number)
            assert stat.S_IMODE(entry.mode) == 0o440

    on_evil(tmp_path, Modeless, story)


class OutOfOrder(Plain):
    """Looks by name are answered as if before the requests that went ahead of them."""

    def lstat(self, path: bytes) -> Any:
        raise asyncssh.SFTPNoSuchFile("No such file")


def test_a_server_that_answers_out_of_order_is_asked_by_the_handle(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        entry = await remote.create(b"new", 0o640, 1)
        assert stat.S_IMODE(entry.mode) == 0o640
        await remote.release(1)

    on_evil(tmp_path, OutOfOrder, story)


def test_a_refused_owner_leaves_the_mode(tmp_path: Path) -> None:
    class Refusing(Plain):
        def setstat(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> Any:
            if attrs.uid is not None:
                raise asyncssh.SFTPPermissionDenied("Permission denied")
            return super().setstat(path, attrs)

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "file").write_bytes(b"x")
        (evil.directory / "file").chmod(0o4755)
        with pytest.raises(NotOwner):
            await remote.set_attributes(b"file", Attributes(uid=1234, mode=0o755))
        assert stat.S_IMODE((evil.directory / "file").stat().st_mode) == 0o4755

    on_evil(tmp_path, Refusing, story)


# --- read-only --------------------------------------------------------------------------------


async def changes_refused(remote: SftpRemote) -> dict[str, type[RemoteError] | None]:
    assert (await remote.connect()).read_only
    return await changes(remote)


async def changes(remote: SftpRemote) -> dict[str, type[RemoteError] | None]:
    """What becomes of every way to change something, where "file" and "d" are."""
    attempts = {
        "create": remote.create(b"new", 0o644, 1),
        "upload": put(remote, b"new", b"x", base_version=b""),
        "overwrite": put(remote, b"file", b"x"),
        "replace": put(remote, b"file", b"x", replace=True),
        "truncate": remote.truncate(b"file", 0),
        "mkdir": remote.make_directory(b"new", 0o755),
        "symlink": remote.make_symlink(b"new", b"file"),
        "link": remote.make_link(b"file", b"new"),
        "open": remote.check_writable(b"file"),
        "rename": remote.rename(b"file", b"new", replace=True),
        "rename to new": remote.rename(b"file", b"new", replace=False),
        "remove": remote.remove(b"file"),
        "rmdir": remote.remove_directory(b"d"),
        "chmod": remote.set_attributes(b"file", Attributes(mode=0o600)),
        "utimes": remote.set_attributes(b"file", Attributes(mtime_ns=10**18)),
        "chgrp": remote.set_attributes(b"file", Attributes(gid=1234)),
    }
    found: dict[str, type[RemoteError] | None] = dict.fromkeys(attempts)
    for name, attempt in attempts.items():
        try:
            await attempt
        except RemoteError as error:
            found[name] = type(error)
    return found


def test_an_sftp_server_that_only_reads(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "d").mkdir(parents=True)
    (folder / "file").write_bytes(b"content")
    with ssh_server(tmp_path / "server", subsystem="internal-sftp -R") as server:
        found = on(server.site_spec(str(folder)), changes_refused)
    del found["link"]  # an extension that it does not offer then
    assert set(found.values()) == {ReadOnly}, found
    assert sorted(os.listdir(folder)) == ["d", "file"]


class ReadOnlyDisk(Plain):
    """EROFS, in OpenSSH's words for it; and full, as all that was made to be read only is."""

    def statvfs(self, path: bytes) -> Any:
        return mock.Mock(spec=os.statvfs_result, **evil_sftp.statvfs_of(f_flag=os.ST_RDONLY))

    def _refuse(self, *_: object, **__: object) -> Any:
        raise asyncssh.SFTPFailure("Failure")

    def open(self, path: bytes, pflags: int, attrs: asyncssh.SFTPAttrs) -> Any:
        if pflags & (asyncssh.FXF_WRITE | asyncssh.FXF_CREAT):
            self._refuse()
        return super().open(path, pflags, attrs)

    mkdir = symlink = link = rename = posix_rename = remove = rmdir = setstat = lsetstat = _refuse


def test_a_file_system_that_the_server_mounted_read_only(tmp_path: Path) -> None:
    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        (evil.directory / "d").mkdir()
        (evil.directory / "file").write_bytes(b"content")
        found = await changes_refused(remote)
        assert set(found.values()) == {ReadOnly}, found

    on_evil(tmp_path, ReadOnlyDisk, story)


def test_a_server_without_extensions_is_not_taken_for_one_that_only_reads(tmp_path: Path) -> None:
    class Refusing(Plain):
        def mkdir(self, path: bytes, attrs: asyncssh.SFTPAttrs) -> None:
            raise asyncssh.SFTPPermissionDenied("Permission denied")

    async def story(remote: SftpRemote, evil: EvilSite) -> None:
        with pytest.raises(PermissionDenied) as raised:
            await remote.make_directory(b"d", 0o755)
        assert not isinstance(raised.value, ReadOnly)
        assert not (await remote.connect()).read_only

    on_evil(tmp_path, Refusing, story, EXTENSIONS)
