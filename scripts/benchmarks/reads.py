"""The steps that read: only the programs' time is measured, checking is outside."""

from __future__ import annotations

import random
import statistics
import subprocess
import tempfile

from scripts.benchmarks import measure
from scripts.benchmarks.measure import WrongResult
from scripts.benchmarks.reader import FIRST_BYTES, PIECE_BYTES
from scripts.benchmarks.steps import Bench, Took

PIECES = 200
WALK_FORMAT = r"%P\t%s\t%m\t%T@\n"


def first_bytes(bench: Bench) -> Took:
    """Return the median over files with different names, each of which is opened for the first
    time."""
    _, (reading,) = bench.read(["first", *map(bench.at, bench.files.big)])
    for name, digest in zip(bench.files.big, reading.digests, strict=True):
        _check(digest, bench.files.digest_of_pieces(name, [0], FIRST_BYTES), name)
    return Took(statistics.median(reading.took))


def sequential(bench: Bench) -> Took:
    return _read_whole(bench, [bench.files.big[0]])


def cached(bench: Bench) -> Took:
    name = bench.files.big[0]
    mount = bench.mount
    measure.drop_cached(mount.files / name, mount.private.cache, mount.pids)
    return _read_whole(bench, [name])


def two_readers(bench: Bench) -> Took:
    return _read_whole(bench, [bench.files.big[0]] * 2)


def eight_readers(bench: Bench) -> Took:
    return _read_whole(bench, bench.files.eight)


def _read_whole(bench: Bench, names: list[str]) -> Took:
    seconds, readings = bench.read(*(["whole", bench.at(name)] for name in names))
    expected = {name: bench.files.digest(name) for name in set(names)}
    for name, reading in zip(names, readings, strict=True):
        _check(reading.digests[0], expected[name], name)
    return Took(seconds)


def random_pieces(bench: Bench) -> Took:
    name, pages = bench.files.big[0], range(bench.files.size // PIECE_BYTES)
    chosen = random.Random(2).sample(pages, min(PIECES, len(pages)))
    offsets = [page * PIECE_BYTES for page in chosen]
    seconds, (reading,) = bench.read(["pieces", bench.at(name), *map(str, offsets)])
    expected = bench.files.digest_of_pieces(name, offsets, PIECE_BYTES)
    _check(reading.digests[0], expected, name)
    return Took(seconds)


def copy_small(bench: Bench) -> Took:
    with tempfile.TemporaryDirectory(dir=bench.scratch) as scratch:
        source, target = bench.at(bench.files.small), f"{scratch}/copy"
        seconds, _ = bench.programs.run("cp", "-r", source, target)
        original = str(bench.files.root / bench.files.small)
        same = subprocess.run(["diff", "-rq", original, target], capture_output=True, text=True)
        if same.returncode:
            raise WrongResult(f"the copy differs: {same.stdout.strip()[:200]}")
    return Took(seconds)


def walk(bench: Bench) -> Took:
    top = bench.at(bench.files.many)
    seconds, told = bench.programs.run("find", top, "-mindepth", "1", "-printf", WALK_FORMAT)
    found = [line.split("\t") for line in told.splitlines()]
    sizes = {path: int(size) for path, size, _, _ in found if "/" in path}
    if sizes != bench.files.sizes_of_many():
        raise WrongResult("find did not show the entries, or not the sizes, that are there")
    return Took(seconds)


def _check(seen: str, expected: str, name: str) -> None:
    if seen != expected:
        raise WrongResult(f"what was read of {name} is not what is there")
