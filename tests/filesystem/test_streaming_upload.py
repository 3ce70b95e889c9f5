"""A large file is sent while it is still being written: what the upload at its close brings then,
and what becomes of it when that was in vain."""

from __future__ import annotations

import os

import pytest
import trio
import trio.testing
from trio.testing import wait_all_tasks_blocked

from hpcfs.cache.ranges import RangeSet
from hpcfs.content.streaming_upload import StreamingUpload
from hpcfs.model.errors import Conflict, PiecesLost, Unreachable
from hpcfs.model.uploads import PIECE_BYTES, UploadRequest
from hpcfs.protocol import messages as m
from tests.filesystem.test_back import back
from tests.filesystem.world import RW, World, live, until
from tests.support.memory_remote import Held

MIB = 1024 * 1024


def piece(number: int) -> bytes:
    return bytes([number]) * PIECE_BYTES


async def write_pieces(w: World, handle: int, count: int, first: int = 0) -> None:
    """With writes of 1 MiB, as the kernel sends them."""
    for number in range(first, count):
        for at in range(0, PIECE_BYTES, MIB):
            data = piece(number)[at : at + MIB]
            await w.kernel.pwrite(handle, number * PIECE_BYTES + at, data)


async def sent(w: World, handle: int, pieces: int) -> None:
    content = w.kernel.node_of(handle).content
    assert content
    await until(lambda: content.upload._sending.sent.total == pieces * PIECE_BYTES)


def the_upload(w: World) -> UploadRequest:
    (upload,) = [call for call in w.cues.calls if isinstance(call, m.Upload)]
    return upload.request


@live()
async def test_what_was_sent_while_it_was_written_is_not_sent_again(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 4)
    await sent(w, handle, 3)
    await w.kernel.pwrite(handle, 4 * PIECE_BYTES, b"end")
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == piece(0) + piece(1) + piece(2) + piece(3) + b"end"
    assert the_upload(w).ranges == [(3 * PIECE_BYTES, PIECE_BYTES + 3)]
    assert w.journal.rows == []
    assert w.remote.ahead == {}


@back()
async def test_in_the_background_too(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 3)
    await sent(w, handle, 2)
    await w.kernel.close(handle)
    await w.queue.wait_for(w.closer.dirty())
    assert w.remote.get(b"f") == piece(0) + piece(1) + piece(2)
    assert the_upload(w).ranges == [(2 * PIECE_BYTES, PIECE_BYTES)]


@live()
async def test_a_small_file_is_not(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 1)
    await w.kernel.close(handle)
    assert w.cues.count(m.UploadPiece) == 0


@live()
async def test_what_was_changed_since_goes_up_again(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 4)
    await sent(w, handle, 3)
    await w.kernel.pwrite(handle, PIECE_BYTES + 5, b"header")
    await w.kernel.close(handle)
    changed = piece(1)[:5] + b"header" + piece(1)[11:]
    assert w.remote.get(b"f") == piece(0) + changed + piece(2) + piece(3)
    assert the_upload(w).ranges == [
        (PIECE_BYTES, PIECE_BYTES),
        (3 * PIECE_BYTES, PIECE_BYTES),
    ]


@live()
async def test_what_is_changed_while_it_is_sent_goes_up_again(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    held = w.cues.hold(m.UploadPiece, stage="after")
    await write_pieces(w, handle, 2)
    await held.reached.wait()
    await w.kernel.pwrite(handle, 7, b"header")
    held.go.set()
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == piece(0)[:7] + b"header" + piece(0)[13:] + piece(1)


@live()
async def test_what_is_on_its_way_at_the_close_counts(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    held = w.cues.hold(m.UploadPiece, stage="after")
    await write_pieces(w, handle, 2)
    await held.reached.wait()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.close, handle)
        await wait_all_tasks_blocked()
        held.go.set()
    assert the_upload(w).ranges == [(PIECE_BYTES, PIECE_BYTES)]
    assert w.remote.get(b"f") == piece(0) + piece(1)


@live()
async def test_a_file_that_is_cut_begins_anew(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 3)
    await sent(w, handle, 2)
    await w.kernel.ftruncate(handle, 5)
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == piece(0)[:5]
    await until(lambda: w.remote.ahead == {})


@live()
async def test_when_what_was_sent_is_lost_all_goes_up_again(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 3)
    await sent(w, handle, 2)
    w.cues.fail(m.Upload, PiecesLost("the transfer process was started anew"))
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == piece(0) + piece(1) + piece(2)


@live()
async def test_a_piece_that_fails_goes_up_at_the_end(w: World) -> None:
    w.cues.fail(m.UploadPiece, Unreachable("the link is down"), nth=2)
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 4)
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == piece(0) + piece(1) + piece(2) + piece(3)


@live()
async def test_a_file_that_is_removed_while_it_is_sent_is_gone(w: World) -> None:
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 3)
    await sent(w, handle, 2)
    await w.kernel.unlink("ns/f")
    await w.kernel.close(handle)
    await until(lambda: w.remote.ahead == {})
    assert w.remote.paths() == {}


@live()
async def test_what_others_made_meanwhile_is_not_overwritten(w: World) -> None:
    if w.remote.is_sftp:  # there the file is made when it is opened, or with its first piece
        return
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    await write_pieces(w, handle, 1)
    w.remote.put(b"f", b"theirs")
    await write_pieces(w, handle, 3, first=1)
    with pytest.raises(Conflict):
        await w.kernel.close(handle)
    assert w.remote.get(b"f") == b"theirs"


@live()
async def test_an_existing_file_that_is_written_anew_is_sent_too(w: World) -> None:
    w.remote.put(b"f", b"old" * MIB)
    handle = await w.kernel.open("ns/f", RW | os.O_TRUNC)
    await write_pieces(w, handle, 3)
    await sent(w, handle, 2)
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == piece(0) + piece(1) + piece(2)
    await trio.lowlevel.checkpoint()


async def cut_while_a_piece_is_on_its_way(w: World) -> tuple[int, Held]:
    """-> (handle, the piece)."""
    handle = await w.kernel.open("ns/f", RW | os.O_CREAT)
    held = w.cues.hold(m.UploadPiece)
    await write_pieces(w, handle, 2)
    await held.reached.wait()
    await w.kernel.ftruncate(handle, 0)
    return handle, held


@live()
async def test_a_piece_that_is_on_its_way_when_the_file_is_cut_harms_nothing(w: World) -> None:
    """The upload waits until the piece is written; what it brings is what the file is by then."""
    handle, held = await cut_while_a_piece_is_on_its_way(w)
    await w.kernel.pwrite(handle, 0, b"short")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(w.kernel.close, handle)
        await wait_all_tasks_blocked()
        assert w.cues.count(m.Upload) == 0
        held.go.set()
    assert w.remote.get(b"f") == b"short"


@live()
async def test_what_is_written_again_after_a_cut_is_sent_again(w: World) -> None:
    """Once the older piece has landed, which may still cut the file there."""
    handle, held = await cut_while_a_piece_is_on_its_way(w)
    for number in (7, 8, 9):
        await w.kernel.pwrite(handle, (number - 7) * PIECE_BYTES, piece(number))
    assert w.cues.count(m.UploadPiece) == 1
    held.go.set()
    await w.kernel.close(handle)
    assert w.remote.get(b"f") == piece(7) + piece(8) + piece(9)


def test_a_piece_that_fails_takes_those_before_it_along() -> None:
    """With the connection the remote may have lost the file's handle, and have begun anew."""

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            fails = trio.Event()

            async def send(handle: int, offset: int) -> None:
                if offset == PIECE_BYTES:
                    await fails.wait()
                    raise Unreachable("the connection was lost")

            sending = StreamingUpload(send, lambda: 7, nursery)
            dirty = RangeSet([(0, 6 * PIECE_BYTES)])
            sending.advance(dirty, 5 * PIECE_BYTES)
            await trio.testing.wait_all_tasks_blocked()
            assert sending.sent.total == 3 * PIECE_BYTES
            fails.set()
            await sending.wait_idle()
            assert not sending.sent, "the upload brings all"

    trio.run(run)
