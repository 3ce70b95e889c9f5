"""A program that writes onto a mount, in a process of its own:
`python -m scripts.benchmarks.writer`.

    writer whole FILE BYTES      a new file, 1 MiB at a time
    writer append FILE BYTES     a new file, 4 KiB at a time, each at the end (O_APPEND)

It prints that it is ready, starts when a line arrives, and prints when it started and ended as
JSON, in seconds of the system's monotonic clock. The end is after close(2), which may fail too.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

WHOLE_BYTES = 1024 * 1024
APPEND_BYTES = 4 * 1024
PIECE_BYTES = {"whole": WHOLE_BYTES, "append": APPEND_BYTES}


@dataclass
class Writing:
    """When a writer began and ended, in seconds of its clock."""

    started: float
    ended: float


def pieces(size: int, length: int) -> Iterator[memoryview]:
    """Yield `size` bytes that are the same each time, in pieces of which no two are equal.

    A piece is overwritten by the next one, so making them costs next to nothing.
    """
    buffer = memoryview(bytearray(random.Random(length).randbytes(length)))
    for start in range(0, size, length):
        buffer[:8] = start.to_bytes(8, "big")
        yield buffer[: size - start]


def write(file: str, flags: int, size: int, length: int) -> Writing:
    started = time.monotonic()
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | flags, 0o644)
    for piece in pieces(size, length):
        while piece:
            piece = piece[os.write(fd, piece) :]
    os.close(fd)
    return Writing(started, time.monotonic())


def main() -> None:
    what, file, size = sys.argv[1:]
    flags = os.O_APPEND if what == "append" else os.O_EXCL
    print("ready", flush=True)
    sys.stdin.readline()
    writing = write(file, flags, int(size), PIECE_BYTES[what])
    print(json.dumps(asdict(writing)))


if __name__ == "__main__":
    main()
