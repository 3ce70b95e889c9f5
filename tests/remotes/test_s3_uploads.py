"""Uploads to S3: conditions, files sent while they are written, changes to large objects."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from botocore.exceptions import ClientError

from hpcfs.model.entries import Attributes, Entry
from hpcfs.model.errors import Conflict, NotSupported, PiecesLost, RemoteFailure, Unreachable
from hpcfs.model.sites import S3Root
from hpcfs.model.uploads import UploadPieceRequest, UploadRequest
from hpcfs.remotes.s3.bucket import MultipartSession
from hpcfs.remotes.s3.parts import MIB, Limits
from hpcfs.remotes.s3.remote import S3Remote
from hpcfs.remotes.s3.site import S3SiteConnection
from tests.remotes.test_s3 import (
    TIME_NS,
    Bytes,
    content,
    names,
    put_directly,
    remote_of,
    run,
    spec_for,
    uploads_left,
)
from tests.support.s3 import S3Server

UNIT = 5 * MIB
LIMITS = Limits(single_put=UNIT, upload_part=UNIT, copy_part=2 * UNIT, parts_per_step=2)
HANDLE = 7


def requests_of(remote: S3Remote) -> list[str]:
    """The operations that the server is asked for from now on, in either way."""
    asked: list[str] = []
    direct, by_client = remote._bucket._access.direct.answer, remote._bucket._by_client

    async def directly(operation: str, *arguments: Any) -> Any:
        asked.append(operation)
        answer = await direct(operation, *arguments)
        if answer is None:  # left to the other way, which counts it
            asked.remove(operation)
        return answer

    async def otherwise(operation: str, parameters: dict[str, Any]) -> Any:
        asked.append(operation)
        return await by_client(operation, parameters)

    remote._bucket._access.direct.answer = directly  # type: ignore[method-assign]
    remote._bucket._by_client = otherwise  # type: ignore[method-assign]
    return asked


def lose_answer(remote: S3Remote, method: str) -> None:
    """The next request of this kind is carried out, and its answer does not come."""
    bucket = remote._bucket
    real: Callable[..., Awaitable[Any]] = getattr(bucket, method)

    async def once(*arguments: Any, **named: Any) -> Any:
        setattr(bucket, method, real)
        await real(*arguments, **named)
        raise Unreachable("the connection was cut")

    setattr(bucket, method, once)


class Watched(Bytes):
    """Counts what is read of it; what is not in `ranges` is not there."""

    def __init__(self, data: bytes, ranges: list[tuple[int, int]] | None = None) -> None:
        super().__init__(data)
        self.ranges = ranges
        self.reads = 0

    def read(self, offset: int, length: int) -> bytes:
        self.reads += length
        if self.ranges is not None:
            inside = any(at <= offset and offset + length <= at + n for at, n in self.ranges)
            assert inside, f"{length} bytes at {offset} are not in the cache file"
        return super().read(offset, length)


async def upload(remote: S3Remote, source: Bytes, **fields: Any) -> Entry:
    given = {"ranges": [(0, source.size)], "attributes": Attributes(mtime_ns=TIME_NS), **fields}
    request = UploadRequest(b"f", source.size, given.pop("base_size", 0), mode=0o644, **given)
    return await remote.upload(request, source, lambda done: None)


# --- conditions -----------------------------------------------------------------------------------


def test_what_others_wrote_meanwhile_is_not_replaced(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            for size in (10, 12 * MIB):
                first = await upload(remote, Bytes(os.urandom(size)), base_version=b"")
                with pytest.raises(Conflict):
                    await upload(remote, Bytes(os.urandom(size)), base_version=b"")
                second = await upload(remote, Bytes(os.urandom(size)), base_version=first.version)
                put_directly(server, f"{prefix}/f", b"theirs")
                for base in (first.version, second.version):
                    with pytest.raises(Conflict):
                        await upload(remote, Bytes(os.urandom(size)), base_version=base)
                assert await content(remote, b"f") == b"theirs"
                await remote.remove(b"f")
                with pytest.raises(Conflict):
                    await upload(remote, Bytes(os.urandom(size)), base_version=second.version)
                assert await names(remote) == {}

    run(test())
    assert uploads_left(server, prefix) == []


def test_a_server_that_minds_is_asked_nothing_before_a_write(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            entry = await upload(remote, Bytes(b"one"), base_version=b"")
            entry = await upload(remote, Bytes(b"two"), base_version=entry.version)
            assert (remote._bucket.server.none_matches, remote._bucket.server.matches) == (
                True,
                True,
            )
            asked = requests_of(remote)
            await upload(remote, Bytes(b"three"), base_version=entry.version)
            assert asked == ["put_object"]

    run(test())


def test_a_server_that_ignores_conditions_is_asked_before(
    rclone: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(rclone, prefix, tmp_path) as remote:
            entry = await upload(remote, Bytes(b"one"), base_version=b"")
            entry = await upload(remote, Bytes(b"two"), base_version=entry.version)
            assert (remote._bucket.server.none_matches, remote._bucket.server.matches) == (
                False,
                False,
            )
            await upload(remote, Bytes(b"three"), base_version=entry.version)
            assert await content(remote, b"f") == b"three"

    run(test())


def test_a_server_that_refuses_conditions_is_asked_without(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    """As Backblaze does: NotImplemented."""

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            bucket = remote._bucket
            put_once, complete = bucket.put, bucket.complete_upload

            async def refusing_put(*arguments: Any, **named: Any) -> str:
                if named.get("base") is not None:
                    raise NotSupported("a header that implies functionality")
                return await put_once(*arguments, **named)

            async def refusing_complete(key: str, upload: str, etags: Any, *base: bytes) -> str:
                if base:
                    raise NotSupported("a header that implies functionality")
                return await complete(key, upload, etags)

            bucket.put = refusing_put  # type: ignore[method-assign]
            bucket.complete_upload = refusing_complete  # type: ignore[method-assign]
            entry = await upload(remote, Bytes(bytes(6 * MIB)), base_version=b"")
            entry = await upload(remote, Bytes(b"two"), base_version=entry.version)
            assert await content(remote, b"f") == b"two"
            assert (bucket.server.none_matches, bucket.server.matches) == (False, False)
            with pytest.raises(Conflict):
                await upload(remote, Bytes(b"three"), base_version=b"")

    run(test())


@pytest.mark.parametrize("size", [10, 12 * MIB + 5])
def test_an_upload_whose_answer_was_lost_may_be_repeated(
    server: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            base = b""
            for data in (os.urandom(size), os.urandom(size)):
                lose_answer(remote, "put" if size <= UNIT else "complete_upload")
                with pytest.raises(Unreachable):
                    await upload(remote, Bytes(data), base_version=base)
                source = Watched(data)
                asked = requests_of(remote)
                entry = await upload(remote, source, base_version=base)
                assert "complete_multipart_upload" not in asked
                assert await remote.stat(b"f") == entry
                assert await content(remote, b"f") == data
                with pytest.raises(Conflict):
                    await upload(remote, Bytes(data[:-1] + b"?"), base_version=base)
                base = entry.version

    run(test())


def test_a_repeated_upload_sets_the_attributes_too(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    put_directly(moto, f"{prefix}/f", b"same")

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            entry = await upload(remote, Bytes(b"same"), base_version=b"")
            assert entry.mtime_ns == TIME_NS
            assert await remote.stat(b"f") == entry

    run(test())


# --- sent ahead -----------------------------------------------------------------------------------


def piece(index: int, **fields: Any) -> UploadPieceRequest:
    return UploadPieceRequest(b"f", index * UNIT, UNIT, 0o644, HANDLE, **fields)


async def finish(
    remote: S3Remote, source: Bytes, ranges: list[tuple[int, int]], **fields: Any
) -> Entry:
    return await upload(remote, source, ranges=ranges, handle=HANDLE, base_version=b"", **fields)


@pytest.mark.parametrize("times_set", [True, False])
def test_a_file_is_sent_while_it_is_written(
    server: S3Server, prefix: str, tmp_path: Path, times_set: bool
) -> None:
    """Parts of one piece, of two, of four; the last piece is never sent ahead."""
    data = os.urandom(9 * UNIT + 17)

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            await remote.create(b"f", 0o644, HANDLE)
            source = Watched(data)
            order = list(range(9))
            random.Random(3).shuffle(order)
            await asyncio.gather(*(remote.upload_piece(piece(n), source) for n in order))
            assert await names(remote) == {}, "nothing is to be seen before the end"
            asked = requests_of(remote)
            ahead = source.reads
            assert ahead >= 6 * UNIT
            tail = [(9 * UNIT, 17)]
            entry = await finish(remote, source, tail, times_set=times_set)
            assert source.reads - ahead == len(data) - ahead, "each byte is sent once"
            assert asked.count("copy_object") == times_set
            assert await remote.stat(b"f") == entry
            assert (await names(remote))[b"f"] == entry
            assert (entry.mtime_ns == TIME_NS) == times_set
            assert await content(remote, b"f") == data

    run(test())
    assert uploads_left(server, prefix) == []


def test_what_was_written_again_is_sent_again(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    """rclone's server takes no part twice: it is sent the whole file."""
    first = os.urandom(4 * UNIT)
    data = bytearray(first + b"more")
    data[UNIT + 5 : UNIT + 9] = b"anew"

    async def test() -> int:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            for n in range(4):
                await remote.upload_piece(piece(n), Bytes(first))
            source = Watched(bytes(data))
            await finish(remote, source, [(UNIT + 5, 4), (4 * UNIT, 4)], times_set=False)
            assert await content(remote, b"f") == data
            return source.reads

    assert run(test()) in (UNIT + 4, UNIT + 4 + len(data))


@pytest.mark.parametrize("size", [0, 3, UNIT, 2 * UNIT + 1])
def test_a_file_may_be_cut_after_it_was_sent(
    server: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    data = os.urandom(4 * UNIT)

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            for n in range(4):
                await remote.upload_piece(piece(n), Bytes(data))
            await finish(remote, Bytes(data[:size]), [])
            assert await content(remote, b"f") == data[:size]

    run(test())
    assert uploads_left(server, prefix) == []


def test_what_was_sent_of_a_file_that_is_given_up_is_removed(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            await remote.upload_piece(piece(0), Bytes(bytes(UNIT)))
            assert len(uploads_left(moto, prefix)) == 1
            await remote.release(HANDLE)
            await remote.release(HANDLE)
            assert uploads_left(moto, prefix) == []
            await remote.upload_piece(piece(0), Bytes(bytes(UNIT)))

    run(test())
    assert uploads_left(moto, prefix) == [], "nor when the process ends"


def test_what_another_process_sent_is_lost(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    data = os.urandom(2 * UNIT)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            with pytest.raises(PiecesLost):
                await finish(remote, Bytes(data), [])
            assert await names(remote) == {}
            for n in range(2):
                await remote.upload_piece(piece(n), Bytes(data))
            with moto.client() as client:  # as a rule of the bucket's does it
                for left in client.list_multipart_uploads(Bucket=moto.bucket)["Uploads"]:
                    client.abort_multipart_upload(
                        Bucket=moto.bucket, Key=left["Key"], UploadId=left["UploadId"]
                    )
            await finish(remote, Bytes(data + b"x"), [(2 * UNIT, 1)])
            assert await content(remote, b"f") == data + b"x"

    run(test())


def test_a_streamed_file_does_not_replace_what_others_made(
    server: S3Server, prefix: str, tmp_path: Path
) -> None:
    data = os.urandom(3 * UNIT)

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            for n in range(3):
                await remote.upload_piece(piece(n), Bytes(data))
            put_directly(server, f"{prefix}/f", b"theirs")
            with pytest.raises(Conflict):
                await finish(remote, Bytes(data), [])
            assert await content(remote, b"f") == b"theirs"
            await remote.release(HANDLE)

    run(test())
    assert uploads_left(server, prefix) == []


def test_a_stream_whose_last_answer_was_lost(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    """The same upload again; or, from another process, the whole file."""
    data = os.urandom(5 * UNIT)

    async def test(*, restarted: bool) -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            for n in range(5):
                await remote.upload_piece(piece(n), Bytes(data))
            lose_answer(remote, "complete_upload")
            with pytest.raises(Unreachable):
                await finish(remote, Bytes(data), [])
            if not restarted:
                await finish(remote, Bytes(data), [])
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            if restarted:
                asked = requests_of(remote)
                entry = await upload(remote, Bytes(data), base_version=b"")
                assert "upload_part" not in asked
                assert entry.mtime_ns == TIME_NS
            assert await content(remote, b"f") == data
            await remote.remove(b"f")

    run(test(restarted=False))
    run(test(restarted=True))


def test_a_part_that_fails_is_sent_at_the_end(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    data = os.urandom(4 * UNIT)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            await remote.upload_piece(piece(0), Bytes(data))
            lose_answer(remote, "upload_part")
            with pytest.raises(Unreachable):
                await remote.upload_piece(piece(1), Bytes(data))
            await remote.upload_piece(piece(2), Bytes(data))
            await finish(remote, Bytes(data), [(UNIT, UNIT), (3 * UNIT, UNIT)])
            assert await content(remote, b"f") == data

    run(test())


def test_a_file_that_was_renamed_while_it_was_sent(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    data = os.urandom(2 * UNIT)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            await remote.upload_piece(piece(0), Bytes(data))
            renamed = UploadPieceRequest(b"g", UNIT, UNIT, 0o644, HANDLE)
            with pytest.raises(PiecesLost):
                await remote.upload_piece(renamed, Bytes(data))
            request = UploadRequest(b"g", len(data), 0, [], Attributes(), 0o644, handle=HANDLE)
            await remote.upload(request, Bytes(data), lambda done: None)
            assert set(await names(remote)) == {b"g"}
            assert await content(remote, b"g") == data

    run(test())
    assert uploads_left(moto, prefix) == []


# --- changes to large objects ---------------------------------------------------------------------


async def change(
    remote: S3Remote,
    old: Entry,
    data: bytes,
    ranges: list[tuple[int, int]],
    base_size: int | None = None,
    **fields: Any,
) -> Entry:
    """With nothing but the ranges in the cache file."""
    given = {"whole": False, **fields}
    source = Watched(data, ranges if not given["whole"] else None)
    return await upload(
        remote, source, ranges=ranges, base_version=old.version,
        base_size=min(old.size, len(data)) if base_size is None else base_size, **given,
    )  # fmt: skip


def test_changes_to_a_large_object_send_only_what_was_changed(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    old = os.urandom(40 * MIB + 11)
    middle = bytearray(old)
    middle[17 * MIB : 17 * MIB + 100] = b"m" * 100
    middle[25 * MIB : 25 * MIB + 6 * MIB] = b"n" * (6 * MIB)
    cases: dict[str, tuple[bytes, list[tuple[int, int]], int]] = {
        "append": (old + b"tail", [(len(old), 4)], len(old)),
        "middle": (bytes(middle), [(17 * MIB, 100), (25 * MIB, 6 * MIB)], len(old)),
        "first byte": (b"?" + old[1:], [(0, 1)], len(old)),
        "last byte": (old[:-1] + b"?", [(len(old) - 1, 1)], len(old)),
        "cut": (old[: 21 * MIB + 1], [], 21 * MIB + 1),
        "hole": (old + bytes(7 * MIB) + b"end", [(len(old) + 7 * MIB, 3)], len(old)),
        "cut and grown": (
            old[: 20 * MIB] + bytes(9 * MIB) + b"x",
            [(29 * MIB, 1)],
            20 * MIB,
        ),
    }

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            assert (await remote.connect()).part_copies
            for data, ranges, base_size in cases.values():
                entry = await upload(remote, Bytes(old))
                asked = requests_of(remote)
                changed = await change(remote, entry, data, ranges, base_size)
                assert "upload_part_copy" in asked
                assert await remote.stat(b"f") == changed
                assert changed.mtime_ns == TIME_NS
                assert await content(remote, b"f") == data

    run(test())
    assert uploads_left(moto, prefix) == []


def test_an_append_sends_nothing_else(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    old = os.urandom(12 * MIB)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            entry = await upload(remote, Bytes(old))
            asked = requests_of(remote)
            await change(remote, entry, old + b"tail", [(len(old), 4)])
            assert "get_object" not in asked
            assert asked.count("upload_part") == 1
            assert asked.count("upload_part_copy") == 1

    run(test())


def test_a_change_of_what_others_changed_is_a_conflict(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    old = os.urandom(20 * MIB)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            entry = await upload(remote, Bytes(old))
            theirs = os.urandom(20 * MIB)
            put_directly(moto, f"{prefix}/f", theirs)
            with pytest.raises(Conflict):
                await change(remote, entry, old + b"tail", [(len(old), 4)])
            assert await content(remote, b"f") == theirs

    run(test())
    assert uploads_left(moto, prefix) == []


def test_others_who_write_while_parts_are_copied_are_noticed(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    old = os.urandom(20 * MIB)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            entry = await upload(remote, Bytes(old))
            real = remote._bucket.parts

            async def then_theirs(key: str, upload: str) -> dict[int, int]:
                put_directly(moto, f"{prefix}/f", b"theirs")
                return await real(key, upload)

            remote._bucket.parts = then_theirs  # type: ignore[method-assign]
            with pytest.raises(Conflict):
                await change(remote, entry, old + b"tail", [(len(old), 4)])
            assert await content(remote, b"f") == b"theirs"

    run(test())
    assert uploads_left(moto, prefix) == []


def test_a_change_whose_answer_was_lost_may_be_repeated(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    old = os.urandom(20 * MIB)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            entry = await upload(remote, Bytes(old))
            lose_answer(remote, "complete_upload")
            for attempt in range(2):
                if attempt == 0:
                    with pytest.raises(Unreachable):
                        await change(remote, entry, old + b"tail", [(len(old), 4)])
                else:
                    asked = requests_of(remote)
                    again = await change(remote, entry, old + b"tail", [(len(old), 4)])
                    assert "upload_part_copy" not in asked
                    assert await remote.stat(b"f") == again
            assert await content(remote, b"f") == old + b"tail"

    run(test())
    assert uploads_left(moto, prefix) == []


def test_a_server_that_cannot_copy_parts_is_sent_the_whole_file(
    rclone: S3Server, prefix: str, tmp_path: Path
) -> None:
    """rclone's answers as if it could, and makes empty parts."""
    old = os.urandom(20 * MIB)
    new = old + b"tail"

    async def test() -> None:
        async with remote_of(rclone, prefix, tmp_path, limits=LIMITS) as remote:
            entry = await upload(remote, Bytes(old))
            with pytest.raises(NotSupported):
                await change(remote, entry, new, [(len(old), 4)])
            assert await content(remote, b"f") == old
            assert not (await remote.connect()).part_copies
            entry = await change(remote, entry, new, [(len(old), 4)], whole=True)
            assert await remote.stat(b"f") == entry
            assert await content(remote, b"f") == new

    run(test())
    assert uploads_left(rclone, prefix) == []


def test_a_small_object_is_sent_whole(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            entry = await upload(remote, Bytes(b"old"))
            with pytest.raises(NotSupported):
                await change(remote, entry, b"oldtail", [(3, 4)])
            await change(remote, entry, b"oldtail", [(3, 4)], whole=True)
            assert await content(remote, b"f") == b"oldtail"

    run(test())


def test_random_changes_do_what_they_do_to_bytes(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    chooser = random.Random(11)

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            data = bytearray(os.urandom(30 * MIB))
            entry = await upload(remote, Bytes(bytes(data)))
            for _ in range(8):
                base_size = len(data)
                ranges = []
                if chooser.random() < 0.4:
                    base_size = chooser.randrange(15 * MIB, len(data))
                    del data[base_size:]
                for _ in range(chooser.randrange(1, 5)):
                    at = chooser.randrange(len(data) + 3 * MIB)
                    piece = chooser.randbytes(chooser.choice([1, 5000, 3 * MIB]))
                    data.extend(bytes(max(0, at + len(piece) - len(data))))
                    data[at : at + len(piece)] = piece
                    ranges.append((at, len(piece)))
                joined = _disjoint(ranges)
                entry = await change(remote, entry, bytes(data), joined, base_size)
                assert await content(remote, b"f") == data

    run(test())


def _disjoint(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for at, length in sorted(ranges):
        if found and at <= found[-1][0] + found[-1][1]:
            start, end = found[-1][0], max(sum(found[-1]), at + length)
            found[-1] = (start, end - start)
        else:
            found.append((at, length))
    return found


# --- integrity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 12 * MIB])
def test_what_arrives_damaged_is_not_taken_for_the_file(
    server: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    """moto does not compare the MD5 that it is sent, and rclone's server does."""

    async def test() -> None:
        async with remote_of(server, prefix, tmp_path, limits=LIMITS) as remote:
            real = remote._bucket._directly

            async def damaged(operation: str, subject: str, parameters: Any, **more: Any) -> Any:
                if "Body" in parameters:
                    body = bytearray(parameters["Body"])
                    body[3] ^= 1
                    parameters = {**parameters, "Body": bytes(body)}
                return await real(operation, subject, parameters, **more)

            remote._bucket._directly = damaged  # type: ignore[method-assign]
            with pytest.raises(RemoteFailure):
                await upload(remote, Bytes(os.urandom(size)))

    run(test())
    assert uploads_left(server, prefix) == []


@pytest.mark.parametrize("way", ["new", "changed"])
def test_a_refused_part_is_told_though_others_hear_first_that_the_upload_is_gone(
    moto: S3Server, prefix: str, tmp_path: Path, way: str
) -> None:
    """rclone's server ends an upload with the part that it refuses."""

    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            old = os.urandom(40 * MIB)
            entry = await upload(remote, Bytes(old))
            bucket, beside_is_gone = remote._bucket, asyncio.Event()
            refused: list[int] = []

            async def part(
                key: str, begun: MultipartSession, number: int, *arguments: Any, **named: Any
            ) -> Any:
                if not refused:
                    refused.append(number)
                    await beside_is_gone.wait()
                    raise RemoteFailure("the part arrived damaged")
                with bucket._watching(key):
                    beside_is_gone.set()
                    answer: Any = {"Error": {"Code": "NoSuchUpload", "Message": ""}}
                    raise ClientError(answer, "UploadPart")

            bucket.upload_part = part  # type: ignore[method-assign,assignment]
            if way == "new":
                uploading = upload(remote, Bytes(os.urandom(11 * MIB)))
            else:  # two parts of it
                ends = [(0, 1), (len(old) - 1, 1)]
                uploading = change(remote, entry, b"?" + old[1:-1] + b"?", ends)
            with pytest.raises(RemoteFailure, match="damaged"):
                await uploading

    run(test())
    assert uploads_left(moto, prefix) == []


def test_an_object_that_is_not_made_of_its_parts_is_noticed(
    moto: S3Server, prefix: str, tmp_path: Path
) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path, limits=LIMITS) as remote:
            await upload(remote, Bytes(os.urandom(11 * MIB)))
            assert remote._bucket.server.joins_md5s
            real = remote._bucket.complete_upload

            async def other(key: str, upload: str, etags: list[str], *base: bytes) -> str:
                return (await real(key, upload, etags, *base))[::-1].replace("3-", "") + "-3"

            remote._bucket.complete_upload = other  # type: ignore[method-assign,assignment]
            with pytest.raises(RemoteFailure, match="parts"):
                await upload(remote, Bytes(os.urandom(11 * MIB)))

    run(test())


@pytest.mark.parametrize("size", [10, 12 * MIB])
def test_verified_uploads_compare_what_the_server_holds(
    server: S3Server, prefix: str, tmp_path: Path, size: int
) -> None:
    data = os.urandom(size)

    async def test() -> None:
        root = S3Root(server.bucket, prefix, verify=True)
        site = S3SiteConnection(spec_for(server, root, tmp_path), LIMITS)
        try:
            remote = site.remote("data")
            await upload(remote, Bytes(data))
            method = "put" if size <= UNIT else "complete_upload"
            real = getattr(remote._bucket, method)

            async def then_another(*arguments: Any, **named: Any) -> str:
                etag: str = await real(*arguments, **named)
                put_directly(server, f"{prefix}/f", os.urandom(size))
                return etag

            setattr(remote._bucket, method, then_another)
            with pytest.raises(RemoteFailure, match="something else"):
                await upload(remote, Bytes(data))
        finally:
            await site.close()

    run(test())


# --- requests -------------------------------------------------------------------------------------


def test_how_many_requests_a_small_file_takes(moto: S3Server, prefix: str, tmp_path: Path) -> None:
    async def test() -> None:
        async with remote_of(moto, prefix, tmp_path) as remote:
            await remote.connect()
            await remote.make_directory(b"d", 0o755)
            first = UploadRequest(b"d/f", 1, 0, [(0, 1)], Attributes(), 0o644, base_version=b"")
            entry = await remote.upload(first, Bytes(b"x"), lambda done: None)
            again = msgspec.structs.replace(first, base_version=entry.version)
            await remote.upload(again, Bytes(b"y"), lambda done: None)
            counts = {}
            for name, steps in {
                "create and upload": (
                    lambda: remote.create(b"d/new", 0o644),
                    lambda: remote.upload(
                        msgspec.structs.replace(first, path=b"d/new"),
                        Bytes(b"x"),
                        lambda done: None,
                    ),
                ),
                "chmod": (lambda: remote.set_attributes(b"d/new", Attributes(mode=0o600)),),
                "utimes": (lambda: remote.set_attributes(b"d/new", Attributes(mtime_ns=5)),),
                "rename": (lambda: remote.rename(b"d/new", b"d/other", replace=True),),
                "remove": (lambda: remote.remove(b"d/other"),),
            }.items():
                asked = requests_of(remote)
                for step in steps:
                    await step()
                counts[name] = sorted(asked)
            assert counts == {
                "create and upload": ["head_object", "list_objects_v2", "put_object"],
                "chmod": ["copy_object"],
                "utimes": ["copy_object"],
                "rename": ["copy_object", "delete_object", "head_object", "list_objects_v2"],
                "remove": ["delete_object"],
            }

    run(test())
