"""Renaming directories on S3: side by side, finished after a crash, never half as success."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import AlreadyExists, DirectoryNotEmpty, NotFound, NotSupported, Unreachable
from hpcfs.remotes.s3 import mover
from hpcfs.remotes.s3.remote import S3Remote
from tests.remotes.test_s3 import (
    MIB,
    SMALL,
    TIME_NS,
    content,
    keys_under,
    names,
    put,
    put_directly,
    remote_of,
    run,
)
from tests.support.command import REPOSITORY
from tests.support.s3 import S3Server

FILES = 45


def fill(server: S3Server, prefix: str) -> dict[str, bytes]:
    """Objects below `a`, by what follows it."""
    files = {f"{number:03}/f": b"data %d" % number for number in range(FILES)}
    with server.client() as client:
        for rest, data in files.items():
            key = f"{prefix}/a/{rest}"
            client.put_object(Bucket=server.bucket, Key=key, Body=data, Metadata={"mtime": "5"})
    return files


def check_none_is_lost(server: S3Server, prefix: str, files: dict[str, bytes]) -> None:
    there = keys_under(server, f"{prefix}/")
    assert all(there & {f"{prefix}/a/{rest}", f"{prefix}/b/{rest}"} for rest in files)


async def check_moved(remote: S3Remote, files: dict[str, bytes]) -> None:
    with pytest.raises(NotFound):
        await remote.stat(b"a")
    for rest, data in files.items():
        path = b"b/" + rest.encode()
        assert await content(remote, path) == data
        assert (await remote.stat(path)).mtime_ns == 5 * 10**9


CHILD = """
    import asyncio, os, sys
    from pathlib import Path
    from hpcfs.remotes.s3 import mover
    from hpcfs.remotes.s3.bucket import Bucket
    from tests.remotes.test_s3 import remote_of
    from tests.support.s3 import S3Server

    endpoint, prefix, cache_dir, method, count = sys.argv[1:]
    mover.DELETED_AT_ONCE = 10
    mover.COPIES_IN_FLIGHT = 4
    left = int(count)
    real = getattr(Bucket, method)

    async def dying(*arguments, **named):
        global left
        answer = await real(*arguments, **named)
        left -= 1
        if left == 0:
            os._exit(9)
        return answer

    setattr(Bucket, method, dying)

    async def main():
        async with remote_of(S3Server(endpoint), prefix, Path(cache_dir)) as remote:
            await remote.rename(b"a", b"b", replace=True)

    asyncio.run(main())
"""


def kill_while_renaming(
    server: S3Server, prefix: str, cache_dir: Path, method: str, count: int
) -> None:
    """As kill -9 does it, after so many answers to these requests."""
    ended = subprocess.run(
        [
            *(sys.executable, "-c", textwrap.dedent(CHILD), server.endpoint_url),
            *(prefix, str(cache_dir), method, str(count)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,
        check=False,
    )
    assert ended.returncode == 9


@pytest.mark.parametrize(
    ("method", "count"),
    [("copy", 1), ("copy", 20), ("copy", FILES), ("delete_many", 1), ("delete_many", 5)],
)
def test_a_killed_rename_is_finished_when_it_is_asked_for_again(
    server: S3Server, prefix: str, tmp_path: Path, method: str, count: int
) -> None:
    files = fill(server, prefix)
    kill_while_renaming(server, prefix, tmp_path, method, count)
    check_none_is_lost(server, prefix, files)

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            copied = 0
            real = remote._bucket.copy

            async def counted(*arguments: Any, **named: Any) -> str:
                nonlocal copied
                copied += 1
                return await real(*arguments, **named)

            remote._bucket.copy = counted  # type: ignore[method-assign]
            await remote.rename(b"a", b"b", replace=True)
            made_before = count if method == "copy" else FILES
            assert copied <= FILES - made_before
            await check_moved(remote, files)
            with pytest.raises(NotFound):
                await remote.rename(b"a", b"b", replace=True)

    run(test())


def test_only_the_rename_that_was_begun_may_go_on(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    fill(moto, prefix)
    put_directly(moto, f"{prefix}/c/f", b"x")
    kill_while_renaming(moto, prefix, tmp_path, "copy", 5)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            with pytest.raises(DirectoryNotEmpty):
                await remote.rename(b"c", b"b", replace=True)
            with pytest.raises(AlreadyExists):
                await remote.rename(b"c", b"b", replace=False)
            with pytest.raises(DirectoryNotEmpty):
                await remote.rename(b"a", b"c", replace=True)
        async with remote_of(moto, prefix, tmp_path / "other-mount") as remote:
            with pytest.raises(DirectoryNotEmpty):
                await remote.rename(b"a", b"b", replace=True)

    (tmp_path / "other-mount").mkdir()
    run(test())


def test_what_changed_after_the_crash_is_copied_as_it_is(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    files = fill(server, prefix)
    kill_while_renaming(server, prefix, tmp_path, "copy", 30)
    for rest in ("000/f", "044/f", "new"):
        files[rest] = b"changed " + rest.encode()
        put_directly(server, f"{prefix}/a/{rest}", files[rest], Metadata={"mtime": "5"})

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await remote.rename(b"a", b"b", replace=True)
            await check_moved(remote, files)

    run(test())


def fail_at(remote: S3Remote, method: str, count: int, times: int = 1) -> None:
    """These requests fail from the one of this number on, so many times."""
    real = getattr(remote._bucket, method)
    asked = 0

    async def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal asked
        asked += 1
        if count <= asked < count + times:
            raise Unreachable("the connection was cut")
        return await real(*arguments, **named)

    setattr(remote._bucket, method, failing)


def test_a_rename_that_fails_takes_its_copies_back(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    files = fill(server, prefix)
    before = keys_under(server, f"{prefix}/")

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            fail_at(remote, "copy", 30)
            with pytest.raises(Unreachable, match=r"cut$"):
                await remote.rename(b"a", b"b", replace=True)
            assert keys_under(server, f"{prefix}/") == before
            await remote.rename(b"a", b"b", replace=True)
            await check_moved(remote, files)

    run(test())


@pytest.mark.parametrize("at", ["copy", "delete"])
def test_a_rename_that_cannot_be_undone_says_so_and_is_finished_later(
    server: S3Server, prefix: str, tmp_path: Path, at: str
) -> None:
    files = fill(server, prefix)

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            if at == "copy":
                fail_at(remote, "copy", 30)
            fail_at(remote, "delete_many", 1)
            with pytest.raises(Unreachable, match=r"cut; .* rename again to finish it"):
                await remote.rename(b"a", b"b", replace=True)
            check_none_is_lost(server, prefix, files)
        async with remote_of(server, prefix, tmp_path) as remote:
            await remote.rename(b"a", b"b", replace=True)
            await check_moved(remote, files)

    run(test())


def test_a_second_call_waits_for_the_first_to_take_back(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    """As when the daemon gave up waiting and asks again."""
    files = fill(moto, prefix)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            begun = asyncio.Event()
            first = asyncio.create_task(
                remote.rename(b"a", b"b", replace=True, report=lambda done: begun.set())
            )
            await begun.wait()
            first.cancel()
            second = asyncio.create_task(remote.rename(b"a", b"b", replace=True))
            with pytest.raises(asyncio.CancelledError):
                await first
            await second
            await check_moved(remote, files)

    run(test())


def test_a_server_that_removes_only_one_at_a_time(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    files = fill(moto, prefix)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:

            async def refuse(keys: list[str]) -> None:
                raise NotSupported("no such operation")

            remote._bucket.delete_many = refuse  # type: ignore[method-assign,assignment]
            reports: list[int] = []
            await remote.rename(b"a", b"b", replace=True, report=reports.append)
            assert reports == sorted(reports)
            assert reports[-1] == 2 * FILES
            await check_moved(remote, files)

    run(test())


def test_a_refused_removal_is_an_error(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    fill(moto, prefix)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            real = remote._bucket._by_client

            async def refused(operation: str, parameters: dict[str, Any]) -> Any:
                if operation == "delete_objects":
                    return {"Errors": [{"Key": "k", "Code": "AccessDenied", "Message": "no"}]}
                return await real(operation, parameters)

            remote._bucket._by_client = refused  # type: ignore[method-assign]
            with pytest.raises(Exception, match=r"denies access.*not finished"):
                await remote.rename(b"a", b"b", replace=True)

    run(test())


def test_large_objects_are_copied_by_parts_and_not_twice(
    moto: S3Server, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their copies have other ETags."""
    monkeypatch.setattr(mover, "NOTED_BYTES", MIB)
    data = os.urandom(11 * MIB)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=SMALL) as remote:
            await remote.make_directory(b"a", 0o750)
            await put(remote, b"a/large", data, Attributes(mtime_ns=TIME_NS))
            await put(remote, b"a/small", b"x")
            fail_at(remote, "delete_many", 1)
            with pytest.raises(Unreachable):
                await remote.rename(b"a", b"b", replace=True)
        async with remote_of(moto, prefix, tmp_path, limits=SMALL) as remote:

            async def refuse(*arguments: Any, **named: Any) -> Any:
                raise AssertionError("copied again")

            remote._bucket.copy_part = refuse  # type: ignore[method-assign]
            await remote.rename(b"a", b"b", replace=True)
            assert await content(remote, b"b/large") == data
            assert (await remote.stat(b"b/large")).mtime_ns == TIME_NS
            assert (await remote.stat(b"b")).mode == stat.S_IFDIR | 0o750
            assert set(await names(remote)) == {b"b"}

    run(test())
