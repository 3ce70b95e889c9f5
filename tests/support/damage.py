"""Damage to files on a disk: flipped bits, zeros, exchanged pages, cut ends."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import strategies as st

PAGE = 4096
KINDS = ("flip", "zero", "swap", "cut", "garbage")

Damage = tuple[str, float, float]
"""A kind, and two places as parts of the file's length."""

part = st.floats(0, 1, exclude_max=True)
damages = st.tuples(st.sampled_from(KINDS), part, part)


def damage(path: Path, how: Damage) -> None:
    """Damage a file in place, under the eyes of whoever has it open."""
    kind, one, two = how
    fd = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(fd).st_size
        if not size:
            return
        first, second = int(one * size), int(two * size)
        page, other = first // PAGE * PAGE, second // PAGE * PAGE
        if kind == "flip":
            (byte,) = os.pread(fd, 1, first)
            os.pwrite(fd, bytes([byte ^ 1 << second % 8]), first)
        elif kind == "zero":
            os.pwrite(fd, bytes(min(PAGE, size - page)), page)
        elif kind == "garbage":
            os.pwrite(fd, os.urandom(min(64, size - first)), first)
        elif kind == "swap":
            mine, theirs = os.pread(fd, PAGE, page), os.pread(fd, PAGE, other)
            os.pwrite(fd, theirs, page)
            os.pwrite(fd, mine, other)
        else:
            os.ftruncate(fd, first)
    finally:
        os.close(fd)
