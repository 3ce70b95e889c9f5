"""Which files come next: learned from a few, never many, none without a pattern."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings, strategies as st

from hpcfs.prefetch.file_predictor import (
    FIRST_AHEAD,
    GOING_ON_AHEAD,
    GOOD_SECONDS,
    MOST_AHEAD,
    PAUSE_SECONDS,
    FilePredictor,
    orders_of,
)

repeatable = settings(deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class File:
    ino: int
    name: bytes


def _directory(count: int, seed: int = 1) -> list[File]:
    """Listed in an order that is neither that of names nor that of inodes."""
    generator = random.Random(seed)
    inos = generator.sample(range(10**6), count)
    files = [File(ino, b"f%05d" % number) for number, ino in enumerate(inos)]
    generator.shuffle(files)
    return files


class Program:
    """Reads files, one every `pace` seconds, and remembers what was fetched ahead of it."""

    def __init__(self, files: list[File], trusted: int | None = None, pace: float = 0.004) -> None:
        self.seconds = 100.0
        self.pace = pace
        self.predictor = FilePredictor(lambda: files, trusted, lambda: self.seconds)
        self.ahead: set[int] = set()
        self.late = 0
        self.most_ahead = 0
        self._read: set[int] = set()

    def read(self, file: File) -> None:
        self.seconds += self.pace
        self.late += file.ino not in self.ahead
        self._read.add(file.ino)
        named = {file.ino for file in self.predictor.opened(file.ino)}
        assert not named & self.ahead, "nothing is named twice"
        self.ahead |= named
        self.most_ahead = max(self.most_ahead, len(self.ahead - self._read))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_order_is_recognised_after_a_few_files(which: int) -> None:
    files = _directory(500)
    program = Program(files)
    for file in orders_of(files)[which].files:
        program.read(file)
    assert program.predictor.order == which
    assert program.late == 3
    assert program.most_ahead <= MOST_AHEAD


def test_skipped_files_do_not_end_it() -> None:
    files = _directory(300)
    program = Program(files)
    for file in sorted(files, key=lambda file: file.name)[::3]:
        program.read(file)
    assert program.late <= 4


def test_random_files_bring_nothing() -> None:
    files = _directory(2000)
    program = Program(files)
    generator = random.Random(3)
    for _ in range(300):
        program.read(generator.choice(files))
    assert len(program.ahead) <= FIRST_AHEAD


def test_a_program_that_goes_on_from_another_directory_needs_no_lesson() -> None:
    files = _directory(100)
    program = Program(files, trusted=1)
    by_name = sorted(files, key=lambda file: file.name)
    program.ahead |= {file.ino for file in program.predictor.first()}
    assert program.ahead == {file.ino for file in by_name[:GOING_ON_AHEAD]}
    for file in by_name:
        program.read(file)
    assert program.late == 0


def test_a_slow_program_gets_no_more_than_it_reads_in_time() -> None:
    files = _directory(300)
    program = Program(files, pace=0.1)
    for file in files:
        program.read(file)
    assert program.most_ahead <= max(FIRST_AHEAD, GOOD_SECONDS / 0.1 + 1)


def test_after_a_pause_what_was_foreseen_is_named_again() -> None:
    files = _directory(100)
    program = Program(files)
    for file in files[:10]:
        program.read(file)
    program.seconds += PAUSE_SECONDS + 1
    program.ahead.clear()
    program.read(files[10])
    assert program.ahead == {file.ino for file in files[11 : 11 + FIRST_AHEAD]}


def test_a_pattern_that_breaks_ends_it() -> None:
    files = _directory(1000)
    program = Program(files)
    for file in files[:10]:
        program.read(file)
    ahead = len(program.ahead)
    for file in random.Random(1).sample(files[200:], 50):
        program.read(file)
    assert len(program.ahead) <= ahead + 3 * MOST_AHEAD
    assert program.predictor.order is None


def test_the_same_file_again_is_no_pattern() -> None:
    files = _directory(50)
    program = Program(files)
    for _ in range(50):
        program.read(files[7])
    assert program.ahead == set()


@repeatable
@given(st.lists(st.integers(0, 59), max_size=200), st.sampled_from([None, 0, 1, 2]))
def test_one_file_never_brings_more_than_the_bound(reads: list[int], trusted: int | None) -> None:
    files = _directory(60)
    predictor = FilePredictor(lambda: files, trusted, lambda: 1.0)
    for index in reads:
        named = predictor.opened(files[index].ino)
        assert len(named) <= MOST_AHEAD
        assert files[index] not in named
