"""Directories as s3fs wrote them once: an empty object without a slash, of a content type of its
own. They are directories, and can be used as such."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import pytest

from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import AlreadyExists, DirectoryNotEmpty, IsADirectory, NotADirectory
from hpcfs.remotes.base import no_report
from hpcfs.remotes.s3.remote import S3Remote
from tests.remotes.test_s3 import keys_under, names
from tests.remotes.test_s3_direct import put, remote_of
from tests.support.s3 import S3Server

OLD: dict[str, Any] = {
    "ContentType": "application/x-directory",
    "Metadata": {"mode": str(0o040750), "mtime": "1600000000", "uid": "1000", "gid": "1000"},
}


@pytest.fixture
def old(moto: S3Server, prefix: str) -> S3Server:
    put(moto, f"{prefix}/empty", **OLD)
    put(moto, f"{prefix}/full", **OLD)
    put(moto, f"{prefix}/full/f", b"data")
    put(moto, f"{prefix}/plain", ContentType="text/plain")
    return moto


def is_old(entry: Entry) -> bool:
    return (entry.mode, entry.mtime_ns) == (0o040750, 1600000000 * 10**9)


def run_on(server: S3Server, prefix: str, cache: Path, work: Any) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, cache=str(cache)) as remote:
            await remote.connect()
            await work(remote)

    asyncio.run(test())


def test_they_are_shown_as_directories(old: S3Server, prefix: str, tmp_path: Path) -> None:
    async def work(remote: S3Remote) -> None:
        found = await names(remote)
        assert found.keys() == {b"empty", b"full", b"plain"}
        assert is_old(found[b"empty"])
        assert is_old(found[b"full"])
        assert stat.S_ISREG(found[b"plain"].mode)
        assert is_old(await remote.stat(b"empty"))
        assert is_old(await remote.stat(b"full"))
        assert await names(remote, b"empty") == {}
        assert (await names(remote, b"full")).keys() == {b"f"}
        with pytest.raises(NotADirectory):
            await names(remote, b"plain")

    run_on(old, prefix, tmp_path, work)


def test_they_can_be_filled_and_removed(old: S3Server, prefix: str, tmp_path: Path) -> None:
    async def work(remote: S3Remote) -> None:
        with pytest.raises(AlreadyExists):
            await remote.make_directory(b"empty", 0o755)
        with pytest.raises(IsADirectory):
            await remote.remove(b"empty")
        with pytest.raises(DirectoryNotEmpty):
            await remote.remove_directory(b"full")
        await remote.make_directory(b"empty/sub", 0o755)
        await remote.remove_directory(b"empty/sub")
        await remote.remove(b"full/f")
        assert (await names(remote)).keys() == {b"empty", b"full", b"plain"}
        for path in (b"empty", b"full"):
            await remote.remove_directory(path)
        assert (await names(remote)).keys() == {b"plain"}

    run_on(old, prefix, tmp_path, work)
    assert keys_under(old, f"{prefix}/") == {f"{prefix}/plain"}


def test_they_become_markers_when_they_are_changed(
    old: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def work(remote: S3Remote) -> None:
        await remote.set_attributes(b"empty", Attributes(mode=0o700))
        entry = await remote.stat(b"empty")
        assert (entry.mode, entry.mtime_ns) == (0o040700, 1600000000 * 10**9)
        await remote.rename(b"full", b"moved", replace=False, report=no_report)
        assert is_old(await remote.stat(b"moved"))
        assert (await remote.stat(b"moved/f")).size == 4
        assert (await names(remote)).keys() == {b"empty", b"moved", b"plain"}

    run_on(old, prefix, tmp_path, work)
    names_left = {"empty/", "moved/", "moved/f", "plain"}
    assert keys_under(old, f"{prefix}/") == {f"{prefix}/{name}" for name in names_left}


def test_one_can_replace_another(old: S3Server, prefix: str, tmp_path: Path) -> None:
    async def work(remote: S3Remote) -> None:
        await remote.rename(b"full", b"empty", replace=True, report=no_report)
        assert (await names(remote)).keys() == {b"empty", b"plain"}
        assert (await names(remote, b"empty")).keys() == {b"f"}

    run_on(old, prefix, tmp_path, work)
    names_left = {"empty/", "empty/f", "plain"}
    assert keys_under(old, f"{prefix}/") == {f"{prefix}/{name}" for name in names_left}
