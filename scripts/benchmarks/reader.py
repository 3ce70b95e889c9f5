"""A program that reads a mount, in a process of its own: `python -m scripts.benchmarks.reader`.

    reader first FILE ...            the first 64 KiB of each, one after another
    reader whole FILE                all of it, 1 MiB at a time
    reader pieces FILE OFFSET ...    4 KiB at each offset, one after another

It prints that it is ready, starts when a line arrives, and prints its times as JSON. They are of
the system's monotonic clock, so that several readers have one beginning and one end. The data is
hashed at once (xxh3, 0.06 s per GiB) while the buffer is still in the processor's cache; that is
part of the measured time and the same for everybody. The hash is checked afterwards.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field

import xxhash

FIRST_BYTES = 64 * 1024
PIECE_BYTES = 4 * 1024
BUFFER_BYTES = 1024 * 1024


@dataclass
class Reading:
    """The result. `digests` and `took` have an item for each file of `first`, otherwise one and
    none."""

    digests: list[str] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0


def first(files: list[str], reading: Reading) -> None:
    for file in files:
        started = time.monotonic()
        fd = os.open(file, os.O_RDONLY)
        data = os.read(fd, FIRST_BYTES)
        os.close(fd)
        reading.took.append(time.monotonic() - started)
        reading.digests.append(xxhash.xxh3_64_hexdigest(data))


def whole(file: str, reading: Reading) -> None:
    state = xxhash.xxh3_64()
    buffer = memoryview(bytearray(BUFFER_BYTES))
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            state.update(buffer[:count])
    reading.digests.append(state.hexdigest())


def pieces(file: str, offsets: list[int], reading: Reading) -> None:
    state = xxhash.xxh3_64()
    fd = os.open(file, os.O_RDONLY)
    for offset in offsets:
        state.update(os.pread(fd, PIECE_BYTES, offset))
    os.close(fd)
    reading.digests.append(state.hexdigest())


def main() -> None:
    what, *arguments = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    reading = Reading(started=time.monotonic())
    if what == "first":
        first(arguments, reading)
    elif what == "whole":
        whole(arguments[0], reading)
    else:
        pieces(arguments[0], [int(offset) for offset in arguments[1:]], reading)
    reading.ended = time.monotonic()
    print(json.dumps(asdict(reading)))


if __name__ == "__main__":
    main()
