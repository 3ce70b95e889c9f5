"""Stories of random changes, the same for the same seed: many files of no bytes, names that are
taken over, attributes alone, and pauses in which uploads begin and end."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from tests.support.promises import Program

SIZES = (0, 0, 0, 1, 5_000, 70_000, 300_000)
NAMES = tuple(f"{folder}{name}" for folder in ("", "d/") for name in "pqrst")
LENGTH = 20
"""Changes of one story."""


def random_bytes(draw: random.Random, size: int) -> bytes:
    """Without zeros, which are what lost bytes look like."""
    return draw.randbytes(size).replace(b"\0", b"\1")


def seeds_of(seed: int) -> dict[str, bytes]:
    """What is there before the story begins."""
    draw = random.Random(f"seeds {seed}")
    names = [*draw.sample(NAMES, 5), "d/seed"]
    return {name: random_bytes(draw, draw.choice(SIZES)) for name in names}


def tell(seed: int, program: Program) -> None:
    """Change what is there in LENGTH random ways."""
    draw = random.Random(seed)
    for _ in range(LENGTH):
        changes = _CHANGES if program.account.files else (_write_anew,)
        draw.choice(changes)(draw, program)


def _existing(draw: random.Random, program: Program) -> str:
    return draw.choice(sorted(program.account.files))


def _write_anew(draw: random.Random, program: Program) -> None:
    data = random_bytes(draw, draw.choice(SIZES))
    cut = draw.randrange(len(data) + 1)
    pieces = [(0, data[:cut]), (cut, data[cut:])] if data else []
    program.write(draw.choice(NAMES), pieces, fsync_after=draw.choice((0, 0, 0, len(pieces))))


def _empty(draw: random.Random, program: Program) -> None:
    program.write(_existing(draw, program), [])


def _write_into(draw: random.Random, program: Program) -> None:
    path = _existing(draw, program)
    size = len(program.account.files[path])
    data = random_bytes(draw, draw.choice((1, 3_000, 100_000)))
    program.write(path, [(draw.choice((draw.randrange(size + 1), size)), data)], os.O_CREAT)


def _truncate(draw: random.Random, program: Program) -> None:
    path = _existing(draw, program)
    size = len(program.account.files[path])
    program.truncate(path, draw.choice((0, size, draw.randrange(size + 1))))


def _set_attributes(draw: random.Random, program: Program) -> None:
    mode, mtime = draw.choice((0o600, 0o644, 0o640)), draw.randrange(10**9, 15 * 10**8)
    program.set_attributes(_existing(draw, program), mode, mtime)


def _rename(draw: random.Random, program: Program) -> None:
    path = _existing(draw, program)
    program.rename(path, draw.choice([name for name in NAMES if name != path]))


def _save_as_editors_do(draw: random.Random, program: Program) -> None:
    """A new file, with attributes or without, is renamed over the old one."""
    path = _existing(draw, program)
    program.write(f"{path}.new", [(0, random_bytes(draw, draw.choice(SIZES)))])
    if draw.random() < 0.5:
        program.set_attributes(f"{path}.new", 0o600, 1_234_567_890)
    program.rename(f"{path}.new", path)


def _unlink(draw: random.Random, program: Program) -> None:
    program.unlink(_existing(draw, program))


def _pause(draw: random.Random, program: Program) -> None:
    time.sleep(draw.choice((0.1, 0.26, 0.3, 0.4)))


_CHANGES: tuple[Callable[[random.Random, Program], None], ...] = (
    _write_anew,
    _empty,
    _empty,
    _write_into,
    _truncate,
    _set_attributes,
    _rename,
    _rename,
    _save_as_editors_do,
    _unlink,
    _pause,
    _pause,
)
