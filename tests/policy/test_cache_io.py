"""What the transfer process puts into cache files: bytes, checksums, and no page cache for long."""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings, strategies as st

from hpcfs.model.entries import BLOCK_BYTES, IN_MEMORY
from hpcfs.model.errors import CacheFileGone
from hpcfs.worker.cache_io import Borrower, CacheDisk, waiting_clock

repeatable = settings(deadline=None, derandomize=True, database=None, max_examples=40)
MIB = 1024 * 1024


@repeatable
@given(st.lists(st.integers(0, 3 * BLOCK_BYTES), max_size=12), st.integers(0, 5))
def test_pieces_of_any_length_are_stored_as_one_range(lengths: list[int], block: int) -> None:
    pieces = [os.urandom(length) for length in lengths]
    whole = b"".join(pieces)
    path = f"/dev/shm/hpcfs-test-{os.getpid()}"
    Path(path).write_bytes(b"")
    try:
        checksums = CacheDisk().store(path, block * BLOCK_BYTES, pieces).checksums
        stored = Path(path).read_bytes()
    finally:
        Path(path).unlink()
    assert stored[block * BLOCK_BYTES :] == whole
    blocks = [whole[at : at + BLOCK_BYTES] for at in range(0, len(whole), BLOCK_BYTES)]
    assert checksums == [xxhash.xxh3_64_intdigest(data) or 1 for data in blocks]


def _resident(path: Path, offset: int, length: int) -> bool:
    """Whether the page cache answers, without asking the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(length)], offset, os.RWF_NOWAIT) == length
        except BlockingIOError:
            return False


@pytest.fixture
def file_on_disk(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(CacheDisk.DISTANCE + 8 * MIB))
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    assert _resident(path, 0, mmap.PAGESIZE)
    return path


def _store(disk: CacheDisk, path: Path, offset: int, length: int) -> None:
    disk.store(str(path), offset, [bytes(length)])


def test_what_lies_far_behind_leaves_the_page_cache(file_on_disk: Path) -> None:
    _store(CacheDisk(), file_on_disk, CacheDisk.DISTANCE, 4 * MIB)
    assert not _resident(file_on_disk, MIB, mmap.PAGESIZE)
    assert _resident(file_on_disk, 6 * MIB, mmap.PAGESIZE), "that is not far enough behind"
    assert _resident(file_on_disk, CacheDisk.DISTANCE, mmap.PAGESIZE)


def test_small_fetches_leave_the_page_cache_alone(file_on_disk: Path) -> None:
    _store(CacheDisk(), file_on_disk, CacheDisk.DISTANCE, BLOCK_BYTES)
    assert _resident(file_on_disk, 0, mmap.PAGESIZE)


def test_a_slow_disk_is_left_alone_for_a_while(file_on_disk: Path) -> None:
    waited = iter([0.0, 0.9, 1.0, *(3.0,) * 6])
    now = 1.0
    disk = CacheDisk(lambda: now, lambda: next(waited))
    _store(disk, file_on_disk, 0, MIB)  # takes a second (the clock is looked at three times)
    assert not disk.is_quick(10)
    _store(disk, file_on_disk, CacheDisk.DISTANCE, 4 * MIB)
    assert _resident(file_on_disk, 0, mmap.PAGESIZE)
    now += CacheDisk.PAUSE_SECONDS
    assert disk.is_quick(10)
    _store(disk, file_on_disk, CacheDisk.DISTANCE, 4 * MIB)
    assert not _resident(file_on_disk, 0, mmap.PAGESIZE)


@pytest.mark.slow
def test_the_clock_of_waiting_stands_still_on_a_busy_machine() -> None:
    """More threads than processors, in processes of their own, as a lock of Python's would be
    waited for."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(6)]
    try:
        began, waited, until = time.monotonic(), waiting_clock(), time.thread_time() + 0.3
        while time.thread_time() < until:
            sum(range(1000))
        took, waited = time.monotonic() - began, waiting_clock() - waited
    finally:
        for one in busy:
            one.kill()
            one.wait()
    assert waited < took / 4


@pytest.mark.slow
def test_the_clock_of_waiting_counts_what_is_waited_for() -> None:
    reading, writing = os.pipe()
    child = subprocess.Popen(["sleep", "0.3"], stdout=writing)
    os.close(writing)
    began, waited = time.monotonic(), waiting_clock()
    assert os.read(reading, 1) == b""
    took, waited = time.monotonic() - began, waiting_clock() - waited
    os.close(reading)
    child.wait()
    assert took / 2 < waited <= took


def test_a_file_in_memory_is_borrowed_by_its_name(tmp_path: Path) -> None:
    fd = os.memfd_create("name", os.MFD_CLOEXEC)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def lend() -> None:
        """As site/worker_process.py does; the first answer is one to a question that was given
        up."""
        socket.send_fds(ours, [b"earlier"], [fd])
        while name := ours.recv(256):
            socket.send_fds(ours, [name], [fd] if name == b"name" else [])

    lending = threading.Thread(target=lend)
    lending.start()
    disk = CacheDisk(borrow=Borrower(theirs).borrow)
    before = len(os.listdir("/proc/self/fd"))
    disk.store(f"{IN_MEMORY}name", BLOCK_BYTES, [b"in memory"])
    assert os.pread(fd, 99, BLOCK_BYTES) == b"in memory"
    with pytest.raises(CacheFileGone):
        disk.store(f"{IN_MEMORY}another", 0, [b"late"])
    assert len(os.listdir("/proc/self/fd")) == before
    ours.shutdown(socket.SHUT_RDWR)
    with pytest.raises(CacheFileGone):
        disk.store(f"{IN_MEMORY}name", 0, [b"late"])
    with pytest.raises(CacheFileGone):
        disk.store(str(tmp_path / "gone"), 0, [b"late"])
    lending.join()
    for one in (ours, theirs):
        one.close()
    os.close(fd)
