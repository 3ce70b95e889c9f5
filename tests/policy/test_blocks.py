"""BlockMap: what is present, what is trusted, and what survives a restart."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from hpcfs.cache.blocks import CHUNK_BLOCKS, BlockMap

repeatable = settings(deadline=None, derandomize=True, database=None)
blocks = st.integers(0, 3 * CHUNK_BLOCKS)
checksums = st.integers(0, 2**64 - 1)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), blocks, checksums),
        st.tuples(st.just("drop"), blocks, st.just(0)),
        st.tuples(st.just("save"), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@repeatable
@given(steps)
def test_it_holds_what_was_put_and_restarts_with_what_was_summed(
    steps: list[tuple[str, int, int]],
) -> None:
    kept, naive, stored = BlockMap(), dict[int, int](), dict[int, bytes]()
    for action, block, checksum in steps:
        if action == "put":
            assert kept.put(block, checksum) == (block not in naive)
            naive[block] = checksum
        elif action == "drop":
            assert kept.drop(block) == (block in naive)
            naive.pop(block, None)
        else:
            stored |= kept.take_changed()
        assert kept.count == len(naive)
        assert kept.summed == sum(1 for checksum in naive.values() if checksum)
    assert list(kept.present()) == sorted(naive)
    assert kept.unsummed() == sorted(block for block, checksum in naive.items() if not checksum)
    assert all(kept.is_trusted(block) for block in naive)

    loaded = BlockMap()
    summed = {block: checksum for block, checksum in naive.items() if checksum}
    saved = {number: sums for number, sums in (stored | kept.take_changed()).items() if sums}
    loaded.load(saved, len(summed))
    assert not any(loaded.are_trusted(range(block, block + 1)) for block in summed)
    assert {block: loaded.checksum(block) for block in loaded.present()} == summed
    assert loaded.count == len(summed)
    assert not any(loaded.is_trusted(block) for block in summed)


def test_a_compared_block_is_trusted() -> None:
    first, second = BlockMap(), BlockMap()
    first.put(5, 7)
    second.load(first.take_changed(), 1)
    assert second.is_present(5)
    assert not second.is_trusted(5)
    second.trust(5)
    assert second.is_trusted(5)


def test_what_was_not_saved_is_given_again() -> None:
    kept = BlockMap()
    kept.put(1, 1)
    kept.put(CHUNK_BLOCKS + 1, 2)
    kept.drop(CHUNK_BLOCKS + 1)
    first = kept.take_changed()
    assert first[1] == b""
    assert kept.take_changed() == {}
    kept.touch(first)
    assert kept.take_changed() == first


def test_a_chunk_of_a_small_file_is_small() -> None:
    kept = BlockMap()
    kept.put(0, 1)
    kept.put(2, 2**56)
    assert len(kept.take_changed()[0]) == 3 * 8


@repeatable
@given(
    st.sets(blocks, max_size=30), st.integers(0, 2 * CHUNK_BLOCKS), st.integers(0, 2 * CHUNK_BLOCKS)
)
def test_runs_are_what_is_present(present: set[int], first: int, more: int) -> None:
    kept = BlockMap()
    for block in present:
        kept.put(block, 1)
    stop = first + more
    upward, downward = list(kept.runs(first, stop)), list(kept.runs(first, stop, downward=True))
    assert downward == upward[::-1]
    assert [b for run in upward for b in run] == sorted(b for b in present if first <= b < stop)
    assert all(run.start // CHUNK_BLOCKS == (run.stop - 1) // CHUNK_BLOCKS for run in upward)


def test_dropped_while_its_runs_are_walked() -> None:
    kept = BlockMap()
    for block in (1, 2, CHUNK_BLOCKS, 5 * CHUNK_BLOCKS):
        kept.put(block, 1)
    for run in kept.runs():
        for block in run:
            kept.drop(block)
        kept.take_changed()
    assert kept.count == 0


def test_a_huge_file_costs_memory_only_where_it_was_touched() -> None:
    kept = BlockMap()
    kept.put(2**40, 1)
    assert len(kept.take_changed()) == 1
    assert not kept.is_present(2**40 - 1)
    assert list(kept.present(2**40 + 1)) == []
