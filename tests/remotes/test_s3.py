"""What only S3 has: keys, markers, metadata, parts; and its failures. On real servers.

The behaviour that S3 shares with SFTP is in the contract suite.
"""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import (
    AccessRefused,
    AlreadyExists,
    Changed,
    DirectoryNotEmpty,
    InvalidName,
    IsADirectory,
    NoSpace,
    NotADirectory,
    NotFound,
    NotSupported,
    PermissionDenied,
    RemoteError,
    TooLarge,
    Unreachable,
    WrongSettings,
)
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.model.uploads import UploadRequest
from hpcfs.remotes.s3.multipart import SourceWindow
from hpcfs.remotes.s3.names import MARKER, shown
from hpcfs.remotes.s3.parts import MIB, Limits
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.support.s3 import BUCKET, S3Server, free_port, rclone_binary, rclone_s3

TIME_NS = 1_700_000_000_123_456_789
SMALL = Limits(
    single_put=5 * MIB, upload_part=5 * MIB, single_copy=5 * MIB, copy_part=5 * MIB, most_parts=100
)


class Bytes:
    """A `UploadSource` over memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)
        self.name = ""

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def spec_for(server: S3Server, root: S3Root, cache_dir: Path, uid: int = 1000) -> SiteSpec:
    site = S3Site(
        endpoint_url=server.endpoint_url,
        region=server.region,
        access_key=Secret(server.access_key),
        secret_key=Secret(server.secret_key),
        connect_timeout=2,
    )
    return SiteSpec(site, {"data": root}, str(cache_dir), uid, uid)


@asynccontextmanager
async def remote_of(
    server: S3Server,
    prefix: str,
    cache_dir: Path,
    *,
    read_only: bool = False,
    limits: Limits | None = None,
    uid: int = 1000,
) -> AsyncIterator[S3Remote]:
    root = S3Root(server.bucket, prefix, read_only)
    site = S3SiteConnection(spec_for(server, root, cache_dir, uid), limits)
    try:
        yield site.remote("data")
    finally:
        await site.close()


async def put(
    remote: S3Remote,
    path: bytes,
    data: bytes = b"",
    attributes: Attributes = Attributes(),  # noqa: B008 - it is immutable
    report: Callable[[int], None] = lambda done: None,
) -> Entry:
    request = UploadRequest(path, len(data), 0, [(0, len(data))], attributes, 0o644)
    return await remote.upload(request, Bytes(data), report)


async def names(remote: S3Remote, path: bytes = b"") -> dict[bytes, Entry]:
    found = [entry async for page in remote.list(path) for entry in page]
    assert len({entry.name for entry in found}) == len(found), "a name is listed twice"
    return {entry.name: entry for entry in found}


async def content(remote: S3Remote, path: bytes) -> bytes:
    entry = await remote.stat(path)
    return b"".join(await remote.fetch(path, entry.version, 0, entry.size, 1))


def keys_under(server: S3Server, prefix: str) -> set[str]:
    with server.client() as client:
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=server.bucket, Prefix=prefix
        )
        return {item["Key"] for page in pages for item in page.get("Contents", [])}


def put_directly(server: S3Server, key: str, data: bytes = b"", **extra: Any) -> None:
    with server.client() as client:
        client.put_object(Bucket=server.bucket, Key=key, Body=data, **extra)


def head_directly(server: S3Server, key: str) -> dict[str, Any]:
    with server.client() as client:
        found: dict[str, Any] = client.head_object(Bucket=server.bucket, Key=key)
        return found


def run(test: Any) -> Any:
    return asyncio.run(test)


# --- attributes ---------------------------------------------------------------------------------


def test_metadata_has_the_form_of_rclone_and_s3fs(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            await put(remote, b"f.html", b"x", Attributes(mode=0o640, mtime_ns=TIME_NS))
            await remote.make_directory(b"d", 0o750)
            await remote.make_symlink(b"l", b"../f.html")

    run(test())
    found = head_directly(moto, f"{prefix}/f.html")
    assert found["Metadata"] == {
        "mode": str(0o100640),
        "uid": "1000",
        "gid": "1000",
        "mtime": "1700000000.123456789",
    }
    assert found["ContentType"] == "text/html"
    directory = head_directly(moto, f"{prefix}/d/")
    assert directory["Metadata"]["mode"] == str(0o040750)
    assert directory["ContentType"] == "application/x-directory"
    assert head_directly(moto, f"{prefix}/l")["Metadata"]["mode"] == str(0o120777)
    with moto.client() as client:
        link = client.get_object(Bucket=moto.bucket, Key=f"{prefix}/l")["Body"]
        assert link.read() == b"../f.html"


def test_objects_of_others_have_sensible_defaults(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    put_directly(moto, f"{prefix}/f", b"abc", Metadata={"mode": "gibberish", "mtime": "soon"})
    put_directly(moto, f"{prefix}/d/x", b"abc")

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            found = await names(remote)
            assert found[b"f"].mode == stat.S_IFREG | 0o644
            assert found[b"d"].mode == stat.S_IFDIR | 0o755
            assert (found[b"f"].uid, found[b"f"].gid) == (1000, 1000)
            modified = head_directly(moto, f"{prefix}/f")["LastModified"]
            assert found[b"f"].mtime_ns == int(modified.timestamp()) * 10**9
            for name, entry in found.items():
                assert await remote.stat(name) == entry

    run(test())


def test_only_root_sees_and_sets_the_owners_that_objects_carry(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    put_directly(moto, f"{prefix}/f", b"abc", Metadata={"uid": "77", "gid": "78"})

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            assert (await remote.stat(b"f")).uid == 1000
            await remote.set_attributes(b"f", Attributes(uid=1000, mode=0o600))
            with pytest.raises(PermissionDenied):
                await remote.set_attributes(b"f", Attributes(uid=5))
        async with remote_of(moto, prefix, tmp_path, uid=0) as remote:
            assert (await remote.stat(b"f")).gid == 78
            await remote.set_attributes(b"f", Attributes(uid=5, gid=6))
            entry = (await names(remote))[b"f"]
            assert (entry.uid, entry.gid) == (5, 6)

    run(test())


def test_what_others_attached_to_an_object_survives_every_change(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    extra = {"Metadata": {"team": "ice"}, "ContentType": "text/x-model", "CacheControl": "no-cache"}
    put_directly(moto, f"{prefix}/f", b"abc", **extra)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=SMALL) as remote:
            for change in (
                lambda: remote.set_attributes(b"f", Attributes(mode=0o600)),
                lambda: put(remote, b"f", b"other"),
                lambda: remote.truncate(b"f", 2),
                lambda: remote.truncate(b"f", 6 * MIB),
                lambda: remote.set_attributes(b"f", Attributes(mtime_ns=TIME_NS)),
                lambda: remote.rename(b"f", b"g", replace=True),
                lambda: remote.rename(b"g", b"f", replace=True),
            ):
                await change()
                key = "g" if b"g" in await names(remote) else "f"
                found = head_directly(moto, f"{prefix}/{key}")
                assert found["Metadata"]["team"] == "ice"
                assert found["ContentType"] == "text/x-model"
                assert found["CacheControl"] == "no-cache"
            assert (await remote.stat(b"f")).mtime_ns == TIME_NS
            assert await content(remote, b"f") == b"ot" + bytes(6 * MIB - 2)

    run(test())


def test_extended_attributes_survive_every_change(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    value = bytes(range(256))
    kept = ((b'user.\xff\xe4 "', value), (b"user.empty", b""))
    xattrs: dict[bytes, bytes | None] = {**dict(kept), b"user.gone": b"x"}

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=SMALL) as remote:
            await put(remote, b"f", b"abc", Attributes(xattrs=xattrs, mtime_ns=TIME_NS))
            changed = await remote.set_attributes(b"f", Attributes(xattrs={b"user.gone": None}))
            assert (changed.xattrs, changed.mtime_ns) == (kept, TIME_NS)
            for change in (
                lambda: remote.set_attributes(b"f", Attributes(mode=0o600)),
                lambda: put(remote, b"f", b"other"),
                lambda: put(remote, b"f", bytes(6 * MIB)),
                lambda: remote.truncate(b"f", 2),
                lambda: remote.set_attributes(b"f", Attributes(mtime_ns=TIME_NS)),
                lambda: remote.rename(b"f", b"g", replace=True),
                lambda: remote.rename(b"g", b"f", replace=True),
            ):
                await change()
                ((name, entry),) = (await names(remote)).items()
                assert entry.xattrs == (await remote.stat(name)).xattrs == kept
            assert entry.mtime_ns == TIME_NS

    run(test())


def test_a_directorys_extended_attributes(server: S3Server, prefix: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await remote.make_directory(b"d", 0o750)
            await remote.set_attributes(b"d", Attributes(xattrs={b"user.a": b"1"}))
            await put(remote, b"d/f", b"x")
            await remote.rename(b"d", b"e", replace=True)
            found = (await names(remote))[b"e"]
            assert (found.xattrs, stat.S_IMODE(found.mode)) == (((b"user.a", b"1"),), 0o750)

    run(test())


def test_a_file_that_replaces_another_does_not_inherit_its_extended_attributes(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await put(remote, b"f", b"old", Attributes(xattrs={b"user.old": b"1"}))
            new = Attributes(xattrs={b"user.new": b"2"})
            request = UploadRequest(b"f", 3, 0, [(0, 3)], new, 0o644, replace=True)
            entry = await remote.upload(request, Bytes(b"new"), lambda done: None)
            assert entry.xattrs == ((b"user.new", b"2"),)

    run(test())


def test_what_other_programs_keep_as_extended_attributes(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    """s3fs stores access lists among them: they stay, and are not shown."""
    wrote = {
        "xattr": "%7B%22system.posix_acl_access%22%3A%22AgA%3D%22%2C%22user.a%22%3A%22AAE%3D%22%7D"
    }
    put_directly(moto, f"{prefix}/f", b"abc", Metadata=wrote)
    put_directly(moto, f"{prefix}/odd", b"abc", Metadata={"xattr": "%7Bnonsense"})

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            assert (await remote.stat(b"f")).xattrs == ((b"user.a", b"\0\1"),)
            await remote.set_attributes(b"f", Attributes(mode=0o600))
            await remote.set_attributes(b"odd", Attributes(mode=0o600))
            with pytest.raises(NoSpace):
                await remote.set_attributes(b"f", Attributes(xattrs={b"user.b": bytes(1600)}))

    run(test())
    assert head_directly(moto, f"{prefix}/f")["Metadata"]["xattr"] == wrote["xattr"]
    assert head_directly(moto, f"{prefix}/odd")["Metadata"]["xattr"] == "%7Bnonsense"


def test_a_new_mode_does_not_change_the_time_of_an_object_without_one(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    put_directly(server, f"{prefix}/f", b"abc")

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            before = await remote.stat(b"f")
            changed = await remote.set_attributes(b"f", Attributes(mode=0o600))
            assert changed.mtime_ns == before.mtime_ns
            assert stat.S_IMODE(changed.mode) == 0o600
            assert await remote.stat(b"f") == changed

    run(test())


def test_rclone_sees_and_keeps_our_times(server: S3Server, prefix: str, tmp_path: Path) -> None:
    """The other program, for real, on the same bucket and in both directions."""
    local = tmp_path / "local"
    local.mkdir()
    (local / "theirs").write_bytes(b"hello")
    os.utime(local / "theirs", ns=(TIME_NS, TIME_NS))
    config = tmp_path / "rclone.conf"
    config.write_text(
        f"[s]\ntype = s3\nprovider = Other\nendpoint = {server.endpoint_url}\n"
        f"access_key_id = {server.access_key}\nsecret_access_key = {server.secret_key}\n"
    )

    def copy(source: str, target: str) -> None:
        command = [str(rclone_binary()), "--config", str(config), "copy", "--metadata"]
        subprocess.run([*command, source, target], check=True, capture_output=True)

    bucket = f"s:{server.bucket}/{prefix}"
    copy(str(local), bucket)

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            theirs = (await names(remote))[b"theirs"]
            assert theirs.mtime_ns == TIME_NS
            assert theirs.mode == (local / "theirs").stat().st_mode
            await put(remote, b"ours", b"data", Attributes(mtime_ns=TIME_NS + 1))
            await remote.rename(b"theirs", b"renamed", replace=True)
            await remote.set_attributes(b"renamed", Attributes(mtime_ns=TIME_NS + 2))

    run(test())
    back = tmp_path / "back"
    copy(bucket, str(back))
    assert (back / "ours").stat().st_mtime_ns == TIME_NS + 1
    assert (back / "renamed").stat().st_mtime_ns == TIME_NS + 2
    assert (back / "renamed").read_bytes() == b"hello"


# --- names --------------------------------------------------------------------------------------


def test_keys_that_are_no_paths_are_shown_and_harm_nothing(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    long = "n" * 300
    objects = {
        "d/": b"",
        "d//x": b"below an empty name",
        "d/../x": b"below ..",
        "d/.": b"one dot",
        f"d/{long}": b"long",
        f"d/{long[:-1]}": b"almost as long",
        "d/a\0b": b"with a NUL",
        "d/x%hpcfs-object": b"looks escaped",
        "d/both": b"object",
        "d/both-more": b"between",
        "d/both/x": b"in the directory",
        "e/": b"a marker with content",
        "e/x": b"beside it",
    }
    for key, data in objects.items():
        put_directly(moto, f"{prefix}/{key}", data)

    async def walk(remote: S3Remote, path: bytes = b"") -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for name, entry in (await names(remote, path)).items():
            child = path + b"/" + name if path else name
            alone = await remote.stat(child)
            assert alone == entry
            if stat.S_ISDIR(entry.mode):
                found |= await walk(remote, child)
            else:
                found[child] = await content(remote, child)
        return found

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            found = await walk(remote)
            expected = sorted(data for key, data in objects.items() if data)
            assert sorted(found.values()) == expected
            assert found[b"d/both%hpcfs-object"] == b"object"
            assert found[b"d/both/x"] == b"in the directory"
            assert found[b"e/" + shown("")] == b"a marker with content"
            await remote.remove(b"d/both%hpcfs-object")
            await remote.rename(b"d/" + shown(".."), b"dots", replace=False)
            await remote.rename(b"d/" + shown(long), b"d/short", replace=False)
            await remote.remove(b"e/" + shown(""))
            await put(remote, b"d/" + shown("a\0b"), b"written")
            with pytest.raises(DirectoryNotEmpty):
                await remote.remove_directory(b"d/" + shown(""))

    run(test())
    left = {key.removeprefix(f"{prefix}/") for key in keys_under(moto, f"{prefix}/")}
    gone = {"d/both", "d/../x", f"d/{long}", "e/"}
    assert left == (set(objects) - gone) | {"dots/x", "d/short"}


def test_reserved_and_impossible_names_are_refused(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            for name in (b"a%hpcfs-b", shown(".."), b"a%hpcfs-object", MARKER.encode()):
                with pytest.raises(InvalidName, match="reserved"):
                    await put(remote, name, b"x")
                with pytest.raises(InvalidName, match="reserved"):
                    await remote.make_directory(name, 0o755)
                with pytest.raises(NotFound):
                    await remote.stat(name)
            with pytest.raises(InvalidName, match="UTF-8"):
                await put(remote, "Bär".encode("latin-1"))
            assert await names(remote) == {}

    run(test())


def test_a_prefix_is_a_wall(server: S3Server, prefix: str, tmp_path: Path) -> None:
    """Neighbours whose keys begin alike are neither seen nor touched."""
    put_directly(server, f"{prefix}-neighbour/f", b"theirs")
    put_directly(server, f"{prefix}x", b"theirs")

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            assert await names(remote) == {}
            await put(remote, b"d", b"ours")
            with pytest.raises(NotFound):
                await remote.stat(b"..")
            await remote.remove(b"d")

    run(test())
    assert keys_under(server, prefix) == {f"{prefix}-neighbour/f", f"{prefix}x"}


# --- directories --------------------------------------------------------------------------------


def test_directories_stay_when_their_last_entry_goes(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    for directory in ("removed", "renamed", "dirs", "dirs2"):
        inner = "sub/f" if directory.startswith("dirs") else "f"
        put_directly(server, f"{prefix}/{directory}/{inner}", b"x")

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await remote.remove(b"removed/f")
            await remote.rename(b"renamed/f", b"f", replace=True)
            await remote.rename(b"dirs/sub", b"sub", replace=True)
            await remote.remove(b"dirs2/sub/f")
            await remote.remove_directory(b"dirs2/sub")
            for name in (b"removed", b"renamed", b"dirs", b"dirs2"):
                assert stat.S_ISDIR((await remote.stat(name)).mode)
                assert await names(remote, name) == {}
                await remote.remove_directory(name)
            assert set(await names(remote)) == {b"f", b"sub"}

    run(test())


def test_removals_side_by_side_leave_the_directory(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    for number in range(12):
        put_directly(server, f"{prefix}/d/{number}", b"x")

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await asyncio.gather(*(remote.remove(b"d/%d" % number) for number in range(12)))
            assert await names(remote, b"d") == {}

    run(test())


def test_empty_directories_take_files_and_keep_attributes(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await remote.make_directory(b"d", 0o700)
            await remote.make_directory(b"d/e", 0o755)
            await remote.set_attributes(b"d", Attributes(mtime_ns=TIME_NS, mode=0o711))
            await put(remote, b"d/e/f", b"x")
        async with remote_of(server, prefix, tmp_path) as remote:
            found = (await names(remote))[b"d"]
            assert (found.mode, found.mtime_ns) == (stat.S_IFDIR | 0o711, TIME_NS)
            assert await remote.stat(b"d") == found
            assert set(await names(remote, b"d")) == {b"e"}
            assert set(await names(remote, b"d/e")) == {b"f"}
            with pytest.raises(DirectoryNotEmpty):
                await remote.remove_directory(b"d")

    run(test())


def test_files_and_directories_do_not_take_each_others_place(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await put(remote, b"f", b"x")
            await remote.make_directory(b"d", 0o755)
            with pytest.raises(AlreadyExists):
                await remote.make_directory(b"f", 0o755)
            with pytest.raises(AlreadyExists):
                await remote.create(b"d", 0o644)
            with pytest.raises(IsADirectory):
                await put(remote, b"d", b"x")
            with pytest.raises(NotADirectory):
                await put(remote, b"f/x", b"x")
            with pytest.raises(NotADirectory):
                await remote.create(b"f/x", 0o644)
            with pytest.raises(NotFound):
                await put(remote, b"nowhere/x", b"x")
            with pytest.raises(IsADirectory):
                await remote.rename(b"f", b"d", replace=True)
            with pytest.raises(NotADirectory):
                await remote.rename(b"d", b"f", replace=True)
            with pytest.raises(IsADirectory):
                await remote.remove(b"d")
            with pytest.raises(NotADirectory):
                await names(remote, b"f")
            with pytest.raises(NotSupported):
                await remote.make_link(b"f", b"g")
            entry = await remote.create(b"new", 0o600)
            assert (entry.version, entry.mode) == (b"", stat.S_IFREG | 0o600)
            assert set(await names(remote)) == {b"f", b"d"}

    run(test())


def test_a_renamed_directory_brings_everything_along(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    files = {b"f%d" % number: b"data %d" % number for number in range(40)}

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await remote.make_directory(b"a", 0o755)
            await remote.make_directory(b"a/empty", 0o700)
            await remote.make_directory(b"target", 0o755)
            for name, data in files.items():
                await put(remote, b"a/" + name, data, Attributes(mtime_ns=TIME_NS))
            await remote.rename(b"a", b"target", replace=True)
            with pytest.raises(NotFound):
                await remote.stat(b"a")
            found = await names(remote, b"target")
            assert set(found) == {*files, b"empty"}
            assert found[b"f7"].mtime_ns == TIME_NS
            assert found[b"empty"].mode == stat.S_IFDIR | 0o700
            for name, data in files.items():
                assert await content(remote, b"target/" + name) == data
            await put(remote, b"other", b"x")
            await remote.make_directory(b"full", 0o755)
            await put(remote, b"full/x", b"x")
            with pytest.raises(DirectoryNotEmpty):
                await remote.rename(b"target", b"full", replace=True)

    run(test())


def test_a_rename_that_fails_midway_loses_nothing_and_leaves_no_copies(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    deep = "/".join(["n" * 200] * 4)
    put_directly(moto, f"{prefix}/a/f", b"x")
    put_directly(moto, f"{prefix}/a/{deep}", b"x")
    before = keys_under(moto, f"{prefix}/")

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            with pytest.raises(RemoteError, match="1024 bytes"):
                await remote.rename(b"a", b"b" * 220, replace=True)

    run(test())
    assert keys_under(moto, f"{prefix}/") == before


def test_a_long_directory_is_listed_whole_and_the_second_time_without_asking_again(
    prefix: str, tmp_path: Path
) -> None:
    """Files on the server's disk, older than the seconds in which a change could go unseen."""
    directory = tmp_path / "buckets" / BUCKET / prefix
    directory.mkdir(parents=True)
    for number in range(1500):
        (directory / f"{number:04}").write_bytes(b"x")
        os.utime(directory / f"{number:04}", ns=(TIME_NS, TIME_NS))

    async def test(server: S3Server) -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            asked = count_heads(remote)
            first = await names(remote)
            assert len(first) == len(asked) == 1500
            assert await names(remote) == first
            assert len(asked) == 1500
        async with remote_of(server, prefix, tmp_path, read_only=True) as remote:
            asked = count_heads(remote)
            listed = await names(remote)
            assert len(listed) == 1500
            for name in (b"0000", b"1499"):
                assert await remote.stat(name) == listed[name]
            assert asked == []

    with rclone_s3(tmp_path / "buckets") as server:
        run(test(server))


def count_heads(remote: S3Remote) -> list[str]:
    """The keys whose headers are asked for from now on."""
    asked: list[str] = []
    real = remote._bucket.head

    async def counted(key: str, *, urgent: bool = True) -> Any:
        asked.append(key)
        return await real(key, urgent=urgent)

    remote._bucket.head = counted  # type: ignore[method-assign]
    return asked


def test_a_change_of_metadata_is_seen_at_once(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with (
            remote_of(server, prefix, tmp_path) as remote,
            remote_of(server, prefix, tmp_path) as other,
        ):
            await put(remote, b"f", b"x", Attributes(mtime_ns=TIME_NS))
            for mode in (0o600, 0o640, 0o644, 0o400):
                await names(remote)
                await other.set_attributes(b"f", Attributes(mode=mode))
                assert stat.S_IMODE((await names(remote))[b"f"].mode) == mode

    run(test())


def test_a_read_only_namespace_changes_nothing(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    put_directly(server, f"{prefix}/f", b"abc", Metadata={"mode": str(0o120777)})

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, read_only=True) as remote:
            await remote.connect()
            entry = (await names(remote))[b"f"]
            assert stat.S_ISREG(entry.mode)
            assert await remote.stat(b"f") == entry
            assert await content(remote, b"f") == b"abc"
            with pytest.raises(PermissionDenied, match="read-only"):
                await put(remote, b"g", b"x")
            with pytest.raises(PermissionDenied, match="read-only"):
                await remote.remove(b"f")

    run(test())


# --- content ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 5 * MIB + 1, 12 * MIB + 7])
def test_files_of_every_size_come_back(
    server: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)
    reports: list[int] = []

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=SMALL) as remote:
            entry = await put(remote, b"f", data, Attributes(mtime_ns=TIME_NS), reports.append)
            assert await remote.stat(b"f") == entry
            assert (await names(remote))[b"f"] == entry
            assert await content(remote, b"f") == data
            if size:
                middle = b"".join(
                    await remote.fetch(b"f", entry.version, size // 2, size - size // 2, 1)
                )
                assert middle == data[size // 2 :]

    run(test())
    assert reports[-1] == size
    assert reports == sorted(reports)


def test_large_objects_are_copied_and_rewritten_by_parts(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    data = os.urandom(11 * MIB)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=SMALL) as remote:
            await put(remote, b"f", data, Attributes(mtime_ns=TIME_NS, mode=0o600))
            entry = await remote.set_attributes(b"f", Attributes(mode=0o640))
            assert await remote.stat(b"f") == entry
            await remote.rename(b"f", b"g", replace=True)
            moved = await remote.stat(b"g")
            assert (moved.mode, moved.mtime_ns) == (stat.S_IFREG | 0o640, TIME_NS)
            assert await content(remote, b"g") == data
            assert set(await names(remote)) == {b"g"}
            await remote.make_directory(b"d", 0o755)
            await remote.rename(b"g", b"d/g", replace=True)
            await remote.rename(b"d", b"e", replace=True)
            assert await content(remote, b"e/g") == data
            assert (await remote.stat(b"e/g")).mtime_ns == TIME_NS

    run(test())


def test_parts_too_large_for_memory_are_streamed(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    data = os.urandom(11 * MIB)
    largest = 0

    class Watched(Bytes):
        def read(self, offset: int, length: int) -> bytes:
            nonlocal largest
            largest = max(largest, length)
            return super().read(offset, length)

    async def test() -> None:
        async with remote_of(
            server, prefix, tmp_path, limits=replace(SMALL, buffered_part=MIB)
        ) as remote:
            request = UploadRequest(b"f", len(data), 0, [(0, len(data))], Attributes(), 0o644)
            await remote.upload(request, Watched(data), lambda done: None)
            assert await content(remote, b"f") == data

    run(test())
    assert 0 < largest <= MIB


def test_a_window_is_a_file() -> None:
    window = SourceWindow(Bytes(b"0123456789"), 2, 5)
    assert window.read() == b"23456"
    assert window.seek(-2, os.SEEK_END) == 3
    assert window.read(10) == b"56"
    assert window.seek(1) == window.tell() == 1
    assert window.read(2) == b"34"


def uploads_left(server: S3Server, prefix: str) -> list[str]:
    """Unfinished ones. rclone's server knows no listing of them before the first one is begun."""
    with server.client() as client:
        try:
            answer = client.list_multipart_uploads(Bucket=server.bucket)
        except client.exceptions.NoSuchUpload:
            return []
        return [one["Key"] for one in answer.get("Uploads", []) if one["Key"].startswith(prefix)]


def test_an_upload_that_fails_leaves_no_parts_and_the_old_content(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    class Broken(Bytes):
        def read(self, offset: int, length: int) -> bytes:
            if offset:
                raise RemoteError("the cache file is gone")
            return super().read(offset, length)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=SMALL) as remote:
            await put(remote, b"f", b"old")
            size = 30 * MIB
            request = UploadRequest(b"f", size, 0, [(0, size)], Attributes(), 0o644)
            with pytest.raises(RemoteError, match="cache file"):
                await remote.upload(request, Broken(bytes(size)), lambda done: None)
            assert await content(remote, b"f") == b"old"

    run(test())
    assert uploads_left(moto, prefix) == []


def test_an_upload_that_is_cancelled_leaves_no_parts(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=SMALL) as remote:
            begun = asyncio.Event()
            upload = asyncio.create_task(
                put(remote, b"f", bytes(60 * MIB), report=lambda done: begun.set())
            )
            await begun.wait()
            upload.cancel()
            with pytest.raises(asyncio.CancelledError):
                await upload
            assert await names(remote) == {}

    run(test())
    assert uploads_left(moto, prefix) == []


def test_a_file_that_s3_cannot_hold_is_refused_at_once(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            source = Bytes(b"")
            source.size = 5 * 2**40 + 1
            request = UploadRequest(b"f", source.size, 0, [], Attributes(), 0o644)
            with pytest.raises(TooLarge, match="5 TiB"):
                await remote.upload(request, source, lambda done: None)

    run(test())


@pytest.mark.parametrize("size", [0, 3, 8, 20])
def test_truncate(server: S3Server, prefix: str, tmp_path: Path, size: int) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            await put(remote, b"f", b"abcdefgh", Attributes(mode=0o600))
            entry = await remote.truncate(b"f", size)
            assert entry.size == size
            assert stat.S_IMODE(entry.mode) == 0o600
            assert await remote.stat(b"f") == entry
            assert await content(remote, b"f") == b"abcdefgh"[:size].ljust(size, b"\0")

    run(test())


# --- failures -----------------------------------------------------------------------------------


def test_an_object_that_changes_or_goes_while_it_is_read(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path) as remote:
            entry = await put(remote, b"f", b"a" * 1000)
            assert b"".join(await remote.fetch(b"f", entry.version, 0, 10, 1)) == b"a" * 10
            put_directly(server, f"{prefix}/f", b"b" * 1000)
            with pytest.raises(Changed):
                await remote.fetch(b"f", entry.version, 10, 10, 1)
            put_directly(server, f"{prefix}/f", b"b")
            with pytest.raises(Changed):
                await remote.fetch(b"f", entry.version, 500, 10, 1)
            shorter = await remote.stat(b"f")
            with pytest.raises(Changed):
                await remote.fetch(b"f", shorter.version, 0, 2, 1)
            await remote.remove(b"f")
            with pytest.raises(Changed):
                await remote.fetch(b"f", shorter.version, 0, 1, 1)
            with pytest.raises(NotFound):
                await remote.remove(b"f")
            with pytest.raises(NotFound):
                await remote.stat(b"f")

    run(test())


def test_no_such_bucket_is_said_and_not_asked_again(server: S3Server, tmp_path: Path) -> None:
    async def test() -> None:
        async with remote_of(replace(server, bucket="no-such-bucket"), "", tmp_path) as remote:
            for _ in range(2):
                with pytest.raises(WrongSettings, match="no such bucket"):
                    await remote.connect()
            with pytest.raises(WrongSettings, match="no such bucket"):
                await remote.stat(b"x")

    run(test())


@pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
def test_wrong_credentials_are_said_and_never_tried_again(
    rclone: S3Server, tmp_path: Path, wrong: str
) -> None:
    """moto believes everybody."""

    async def test() -> None:
        other = replace(rclone, **{wrong: "AKIAWRONGWRONGWRONG0"})
        async with remote_of(other, "", tmp_path) as remote:
            with pytest.raises(AccessRefused, match=r"refused|does not know") as caught:
                await remote.connect()
            assert "WRONGWRONG" not in str(caught.value)
            ask_no_more(remote)
            with pytest.raises(AccessRefused):
                await remote.stat(b"x")

    run(test())


def ask_no_more(remote: S3Remote) -> None:
    async def refuse(*arguments: Any) -> Any:
        raise AssertionError("the server was asked again")

    remote._bucket._by_client = refuse  # type: ignore[method-assign]
    remote._bucket._access.direct.answer = refuse  # type: ignore[method-assign]


def test_no_credentials_at_all(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    async def connect(**site: Any) -> None:
        spec = SiteSpec(
            S3Site(endpoint_url=rclone.endpoint_url, **site),
            {"data": S3Root(rclone.bucket)},
            str(tmp_path),
            1000,
            1000,
        )
        connection = S3SiteConnection(spec)
        try:
            await connection.remote("data").connect()
        finally:
            await connection.close()

    with pytest.raises(AccessRefused, match="no usable S3 credentials"):
        run(connect())
    with pytest.raises(WrongSettings, match="nobody"):
        run(connect(profile="nobody"))
    credentials = tmp_path / "credentials"
    credentials.write_text(
        f"[cluster]\naws_access_key_id = {rclone.access_key}\n"
        f"aws_secret_access_key = {rclone.secret_key}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    run(connect(profile="cluster"))


def test_a_dead_endpoint_answers_at_once_the_second_time(tmp_path: Path) -> None:
    server = S3Server(f"http://127.0.0.1:{free_port()}")

    async def test() -> None:
        async with remote_of(server, "", tmp_path) as remote:
            with pytest.raises(Unreachable, match="can't be reached"):
                await remote.connect()
            ask_no_more(remote)
            with pytest.raises(Unreachable, match="can't be reached"):
                await remote.stat(b"x")

    run(test())


def test_an_endpoint_that_is_no_url(tmp_path: Path) -> None:
    async def test() -> None:
        async with remote_of(S3Server("storage example"), "", tmp_path) as remote:
            with pytest.raises(WrongSettings, match="endpoint"):
                await remote.connect()

    run(test())
