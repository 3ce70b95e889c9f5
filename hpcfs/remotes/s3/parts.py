"""Cuts an object into parts: pure. Sizes and offsets in bytes.

S3 takes at most 10,000 parts of 5 MiB to 5 GiB; only the last may be smaller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from hpcfs.model.uploads import PIECE_BYTES

MIB = 1024 * 1024
GIB = 1024 * MIB


@dataclass(frozen=True)
class Part:
    """`number` counts from 1. A part that is `copied` comes from the old object, on the server."""

    number: int
    offset: int
    length: int
    copied: bool = False

    @property
    def end(self) -> int:
        """The offset behind its last byte."""
        return self.offset + self.length


@dataclass(frozen=True)
class Limits:
    """S3's limits, and what is used of them. Sizes in bytes."""

    largest_object: int = 5 * 1024 * GIB
    most_parts: int = 10_000
    smallest_part: int = 5 * MIB
    single_put: int = 16 * MIB
    """Larger files go by parts: side by side they are faster, and a failure costs one part."""
    upload_part: int = PIECE_BYTES
    parts_per_step: int = 1024
    """Of a file whose size is not known yet, so many parts in a row have one size (see Growing)."""
    single_copy: int = 5 * GIB
    copy_part: int = 512 * MIB
    buffered_part: int = 64 * MIB
    """Larger parts are streamed from the file instead of being read first."""
    parts_in_flight: int = 4

    def part_size(self, size: int, smallest: int) -> int:
        """The smallest that suffices, a multiple of `smallest` up to 8 MiB, then of 1 MiB."""
        needed = -(-size // self.most_parts)
        unit = min(smallest, MIB)
        return max(smallest, -(-needed // unit) * unit)


@dataclass(frozen=True)
class Growing:
    """Parts of a file that is still being written: `step` of one `unit`, as many of two, of four...

    With 1024 parts of 16 MiB at first, 5 TiB are 8,452 parts, of 4 GiB at the end. Up to 16 GiB all
    have one size, which some servers insist on (Cloudflare R2).
    """

    unit: int
    step: int

    def part(self, number: int) -> Part:
        """Return the part of this number, counted from 1."""
        level, index = divmod(number - 1, self.step)
        units = self.step * ((1 << level) - 1) + (index << level)
        return Part(number, units * self.unit, self.unit << level)

    def number_at(self, offset: int) -> int:
        """Return the number of the part with the byte at `offset`."""
        units = offset // self.unit
        level = (units // self.step + 1).bit_length() - 1
        index = (units - self.step * ((1 << level) - 1)) >> level
        return level * self.step + index + 1

    def parts(self, size: int) -> Iterator[Part]:
        """Return the parts of a file of that size, at least one."""
        part = self.part(1)
        while part.end < size:
            yield part
            part = self.part(part.number + 1)
        yield Part(part.number, part.offset, size - part.offset)


def even(size: int, part_size: int) -> list[Part]:
    """Return parts of one size, but for the last."""
    count = max(1, -(-size // part_size))
    starts = [index * part_size for index in range(count)]
    return [
        Part(number, start, min(part_size, size - start)) for number, start in enumerate(starts, 1)
    ]


Range = tuple[int, int]
"""Start and end."""


def changed(
    size: int, base_size: int, ranges: Iterable[tuple[int, int]], limits: Limits
) -> list[Part] | None:
    """The parts of an object that was changed in `ranges` (offset, length) and has `base_size`
    bytes in common with the old one otherwise. None where nothing is worth being copied.

    Clean stretches shorter than a part must be are sent with what is beside them; longer ones too
    where the parts would be too many.
    """
    dirty = merged(
        [*((start, start + length) for start, length in ranges), (base_size, size)], size
    )
    shortest = limits.smallest_part
    while shortest < size:
        stretches = list(_stretches(size, dirty, shortest, limits.smallest_part))
        if not any(copied for _, _, copied in stretches):
            return None
        parts = _cut(stretches, limits)
        if len(parts) <= limits.most_parts:
            return parts
        shortest *= 2
    return None


def merged(ranges: Iterable[Range], size: int) -> list[Range]:
    """Return the ranges in order, without overlaps, none empty, as far as `size`."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        end = min(end, size)
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _stretches(
    size: int, dirty: Sequence[Range], shortest: int, smallest_part: int
) -> Iterator[tuple[int, int, bool]]:
    """Start, end, whether it is copied; alternating. `shortest` is how long a copied one must be,
    the last excepted."""
    position = 0
    sent: Range | None = None
    for start, end in dirty:
        if sent is not None:
            position = max(sent[1], sent[0] + smallest_part)
        if start - position >= shortest:
            if sent is not None:
                yield sent[0], position, False
            yield position, start, True
            sent = (start, end)
        else:
            sent = (sent[0] if sent is not None else 0, end)
    if sent is not None:
        position = min(size, max(sent[1], sent[0] + smallest_part))
        yield sent[0], position, False
    if position < size:
        yield position, size, True


def _cut(stretches: Sequence[tuple[int, int, bool]], limits: Limits) -> list[Part]:
    """The last part of a stretch is up to twice as long, so that none is too small."""
    lengths = dict.fromkeys((False, True), 0)
    for start, end, copied in stretches:
        lengths[copied] += end - start
    most = max(1, limits.most_parts // 4)
    sizes = {
        False: max(limits.upload_part, -(-lengths[False] // most)),
        True: max(limits.copy_part, -(-lengths[True] // most)),
    }
    parts: list[Part] = []
    for start, end, copied in stretches:
        count = max(1, (end - start) // sizes[copied])
        for index in range(count):
            offset = start + index * sizes[copied]
            stop = end if index == count - 1 else offset + sizes[copied]
            parts.append(Part(len(parts) + 1, offset, stop - offset, copied))
    return parts
