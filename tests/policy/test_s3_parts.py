"""How objects are cut into parts: whatever their size, and whatever was changed in them."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from hpcfs.model.uploads import PIECE_BYTES
from hpcfs.remotes.s3.parts import GIB, MIB, Growing, Limits, Part, changed, even, merged

LARGEST = 5 * 1024 * GIB
GROWING = Growing(PIECE_BYTES, 1024)
sizes = st.integers(1, LARGEST) | st.integers(1, 40).map(lambda n: n * PIECE_BYTES)


def check(parts: list[Part], size: int) -> None:
    """What S3 asks of parts, and that they are the object."""
    assert [part.number for part in parts] == list(range(1, len(parts) + 1))
    assert len(parts) <= 10_000
    position = 0
    for part in parts:
        assert part.offset == position
        position = part.end
    assert position == size
    assert all(5 * MIB <= part.length <= 5 * GIB for part in parts[:-1])
    assert 0 < parts[-1].length <= 5 * GIB


@given(size=sizes)
@settings(deadline=None, max_examples=30)
def test_a_file_of_any_size_that_is_not_known_at_first_fits(size: int) -> None:
    parts = list(GROWING.parts(size))
    check(parts, size)
    assert all(part.length % PIECE_BYTES == 0 for part in parts[:-1])
    for part in (parts[0], parts[len(parts) // 2], parts[-1]):
        assert GROWING.number_at(part.offset) == GROWING.number_at(part.end - 1) == part.number
        assert part.offset % PIECE_BYTES == 0


def test_the_largest_file_fits_and_the_usual_ones_have_equal_parts() -> None:
    assert len(list(GROWING.parts(LARGEST))) < 9_000
    assert {part.length for part in GROWING.parts(16 * GIB)} == {PIECE_BYTES}


@given(size=sizes)
@settings(deadline=None, max_examples=30)
def test_a_file_of_known_size_fits(size: int) -> None:
    limits = Limits()
    check(even(size, limits.part_size(size, limits.upload_part)), size)


@st.composite
def changes(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    size = draw(st.integers(1, LARGEST) | st.integers(1, 400 * MIB))
    base_size = draw(st.integers(0, size) | st.just(size))
    offsets = st.integers(0, size - 1)
    ranges = draw(st.lists(st.tuples(offsets, st.integers(1, 64 * MIB)), max_size=30))
    return size, base_size, [(at, min(length, size - at)) for at, length in ranges]


@given(changes())
@settings(deadline=None, max_examples=200)
def test_what_was_changed_is_sent_and_the_rest_is_copied(
    change: tuple[int, int, list[tuple[int, int]]],
) -> None:
    size, base_size, ranges = change
    parts = changed(size, base_size, ranges, Limits())
    written = merged([*((at, at + length) for at, length in ranges), (base_size, size)], size)
    if parts is None:
        gaps = zip(
            [0, *(end for _, end in written)], [*(at for at, _ in written), size], strict=True
        )
        assert all(stop - start < 10 * MIB for start, stop in gaps), "something could be copied"
        return
    check(parts, size)
    for part in parts:
        touched = any(at < part.end and part.offset < end for at, end in written)
        assert not (part.copied and touched)
    sent = sum(part.length for part in parts if not part.copied)
    assert sent <= sum(end - at for at, end in written) + len(written) * 10 * MIB


def test_an_append_costs_what_was_appended() -> None:
    size = 100 * GIB + 12345
    parts = changed(size + 10, size, [(size, 10)], Limits())
    assert parts is not None
    assert [part.length for part in parts if not part.copied] == [10]


def test_too_many_changes_to_copy_all_that_lies_between() -> None:
    size = 1024 * GIB
    ranges = [(at, 4096) for at in range(0, size, 20 * MIB)]
    parts = changed(size, size, ranges, Limits())
    assert parts is None or len(parts) <= 10_000


def test_a_cut_file_is_copied() -> None:
    parts = changed(700 * MIB, 700 * MIB, [], Limits())
    assert parts is not None
    check(parts, 700 * MIB)
    assert all(part.copied for part in parts)
