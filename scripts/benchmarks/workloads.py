"""What is measured: each workload does its work on a fresh mount, then checks what came of it.

Steps that belong together share a mount: reading again needs what was read before. The clock runs
only while the programs do; mounting, starting Python and checking are outside.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks import measure
from scripts.benchmarks.files import Files
from scripts.benchmarks.measure import Programs, WrongResult
from scripts.benchmarks.peers import Mount
from scripts.benchmarks.reader import FIRST_BYTES, PIECE_BYTES, Reading

PIECES = 200
SCRATCH_BYTES = 2**28
WALK_FORMAT = r"%P\t%s\t%m\t%T@\n"


@dataclass(frozen=True)
class Bench:
    """What a step works with."""

    files: Files
    mount: Mount
    programs: Programs
    scratch: Path
    """On a disk in memory, if there is one."""

    def at(self, name: str) -> str:
        return str(self.mount.files / name)

    def read(self, *commands: list[str]) -> tuple[float, list[Reading]]:
        """Several readers at once: seconds from the first one's start to the last one's end."""
        reader = [sys.executable, "-m", "scripts.benchmarks.reader"]
        told = self.programs.together([[*reader, *command] for command in commands])
        readings = [Reading(**json.loads(line)) for line in told]
        started = min(reading.started for reading in readings)
        return max(reading.ended for reading in readings) - started, readings


Step = Callable[[Bench], float]


def first_bytes(bench: Bench) -> float:
    """The median over files of other names: each is opened for the first time."""
    _, (reading,) = bench.read(["first", *map(bench.at, bench.files.big)])
    for name, digest in zip(bench.files.big, reading.digests, strict=True):
        _check(digest, bench.files.digest_of_pieces(name, [0], FIRST_BYTES), name)
    return statistics.median(reading.took)


def sequential(bench: Bench) -> float:
    return _read_whole(bench, [bench.files.big[0]])


def cached(bench: Bench) -> float:
    name = bench.files.big[0]
    mount = bench.mount
    measure.drop_cached(mount.files / name, mount.private.cache, mount.pids)
    return _read_whole(bench, [name])


def two_readers(bench: Bench) -> float:
    return _read_whole(bench, [bench.files.big[0]] * 2)


def eight_readers(bench: Bench) -> float:
    return _read_whole(bench, bench.files.eight)


def _read_whole(bench: Bench, names: list[str]) -> float:
    seconds, readings = bench.read(*(["whole", bench.at(name)] for name in names))
    expected = {name: bench.files.digest(name) for name in set(names)}
    for name, reading in zip(names, readings, strict=True):
        _check(reading.digests[0], expected[name], name)
    return seconds


def random_pieces(bench: Bench) -> float:
    name, pages = bench.files.big[0], range(bench.files.size // PIECE_BYTES)
    chosen = random.Random(2).sample(pages, min(PIECES, len(pages)))
    offsets = [page * PIECE_BYTES for page in chosen]
    seconds, (reading,) = bench.read(["pieces", bench.at(name), *map(str, offsets)])
    expected = bench.files.digest_of_pieces(name, offsets, PIECE_BYTES)
    _check(reading.digests[0], expected, name)
    return seconds


def copy_small(bench: Bench) -> float:
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        source, target = bench.at(bench.files.small), f"{scratch}/copy"
        seconds, _ = bench.programs.run("cp", "-r", source, target)
        original = str(bench.files.root / bench.files.small)
        same = subprocess.run(["diff", "-rq", original, target], capture_output=True, text=True)
        if same.returncode:
            raise WrongResult(f"the copy differs: {same.stdout.strip()[:200]}")
    return seconds


def walk(bench: Bench) -> float:
    top = bench.at(bench.files.many)
    seconds, told = bench.programs.run("find", top, "-mindepth", "1", "-printf", WALK_FORMAT)
    found = [line.split("\t") for line in told.splitlines()]
    sizes = {path: int(size) for path, size, _, _ in found if "/" in path}
    if sizes != bench.files.sizes_of_many():
        raise WrongResult("find did not show the entries, or not the sizes, that are there")
    return seconds


def _check(seen: str, expected: str, name: str) -> None:
    if seen != expected:
        raise WrongResult(f"what was read of {name} is not what is there")


@dataclass(frozen=True)
class Workload:
    """Its steps share one mount; each is a row of the results."""

    steps: dict[str, Step]


WORKLOADS = (
    Workload({"first": first_bytes}),
    Workload({"sequential": sequential, "cached": cached}),
    Workload({"random": random_pieces}),
    Workload({"copy": copy_small}),
    Workload({"walk": walk, "rewalk": walk}),
    Workload({"two-readers": two_readers}),
    Workload({"eight-readers": eight_readers}),
)
NAMES = [name for workload in WORKLOADS for name in workload.steps]


def titles(size: int) -> dict[str, str]:
    """For tables: by the step's name, in their order."""
    amount = f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / 2**20:g} MiB"
    small = f"{size / 2**24:g} MiB"
    return {
        "first": f"first 64 KiB of {amount}",
        "sequential": f"{amount}, one after another",
        "cached": f"{amount} again, from the cache",
        "random": f"{PIECES} random reads of 4 KiB",
        "copy": "copy out 500 small files",
        "walk": "walk 5,000 entries",
        "rewalk": "walk them again",
        "two-readers": f"two readers on one file of {amount}",
        "eight-readers": f"eight readers, {small} each",
    }


def scratch_directory(otherwise: Path) -> Path:
    """In memory where there is room: a local disk has no part in what is measured."""
    shared = Path("/dev/shm")
    roomy = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > SCRATCH_BYTES
    return shared if roomy else otherwise
