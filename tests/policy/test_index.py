"""The cache's index: what it remembers, across restarts, kills and damage."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings, strategies as st

from hpcfs.cache.index import Index, Record

LATIN1 = "häuser/ä".encode("latin-1")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path / "index.db")
    yield opened
    opened.close()


def record(name: str, key: bytes, *, used: float = 1.0, size: int = 100) -> Record:
    return Record(name, "origin", key, b"v1", size, size, used, 1, chunks={0: b"12345678"})


def stored(record: Record | None) -> Record | None:
    """Without the number that the database gave it."""
    return record and msgspec.structs.replace(record, row=0)


def keys(index: Index) -> dict[bytes, str]:
    rows = index._db.execute("SELECT key, name FROM files").fetchall()
    return {bytes(key): name for key, name in rows}


def test_what_was_saved_is_found(index: Index) -> None:
    saved = record("one", LATIN1)
    assert index.save([saved]) == []
    assert stored(index.find("origin", LATIN1)) == saved
    assert index.find("another", LATIN1) is None
    assert index.find("origin", b"other") is None
    assert index.known(["one", "two"]) == {"one"}
    assert index.total_bytes() == 100


def test_another_file_of_the_same_key_replaces(index: Index) -> None:
    index.save([record("one", b"k")])
    assert index.save([record("two", b"k")]) == ["one"]
    assert keys(index) == {b"k": "two"}


def test_chunks_are_added_to_those_known(index: Index) -> None:
    index.save([record("one", b"k")])
    index.save([Record("one", "origin", b"k", b"v2", 7, 7, 2.0, chunks={3: b"abcdefgh"})])
    found = index.find("origin", b"k")
    assert found
    assert found.chunks == {0: b"12345678", 3: b"abcdefgh"}
    assert found.version == b"v2"
    index.save([Record("one", "origin", b"k", b"v2", 7, 7, 2.0, chunks={0: b""})])
    found = index.find("origin", b"k")
    assert found
    assert found.chunks == {3: b"abcdefgh"}


@pytest.mark.parametrize("old", [b"d", LATIN1.partition(b"/")[0]])
def test_a_renamed_directory_takes_all_below_along(index: Index, old: bytes) -> None:
    names = [old, old + b"/x", old + b"/x/y", old + b"0", old + b".", b"n/gone", b"n", b"n2"]
    index.save([record(str(number), key) for number, key in enumerate(names)])
    assert sorted(index.move("origin", old, b"n")) == ["5", "6"]
    assert keys(index) == {
        b"n": "0",
        b"n/x": "1",
        b"n/x/y": "2",
        old + b"0": "3",
        old + b".": "4",
        b"n2": "7",
    }


def test_what_is_removed_is_gone_with_all_below(index: Index) -> None:
    index.save([record(str(n), key) for n, key in enumerate([b"d", b"d/x", b"dx", b"d0"])])
    assert sorted(index.remove("origin", b"d")) == ["0", "1"]
    assert keys(index) == {b"dx": "2", b"d0": "3"}


def test_the_oldest_come_first(index: Index) -> None:
    index.save([record(str(n), b"%d" % n, used=float(10 - n)) for n in range(5)])
    index.save([record("5", b"5", used=8.0)])
    first = index.oldest((-1.0, 0), 3)
    assert [found.name for found in first] == ["4", "3", "2"]
    after = (first[-1].last_used, first[-1].row)
    assert [found.name for found in index.oldest(after, 9)] == ["5", "1", "0"]


def test_a_new_version_is_taken_only_for_the_one_that_was_meant(index: Index) -> None:
    index.save([record("one", b"k")])
    index.renew_version("origin", b"k", b"v0", b"v9")
    index.renew_version("origin", b"k", b"v1", b"v2")
    found = index.find("origin", b"k")
    assert found
    assert found.version == b"v2"


def test_a_failed_transaction_changes_nothing(index: Index) -> None:
    index.save([record("one", b"k")])
    broken = Record("two", "origin", b"k", b"v", 1, 1, 1.0, chunks={0: object()})  # type: ignore[dict-item]
    with pytest.raises(sqlite3.Error):
        index.save([broken])
    assert keys(index) == {b"k": "one"}


def test_what_a_killed_daemon_left_opens(index: Index, tmp_path: Path) -> None:
    """kill -9: the files as they are at this moment, nothing closed."""
    index.save([record("one", b"k")])
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in tmp_path.glob("index.db*"):
        if not path.name.endswith("-shm"):  # shared memory is built anew
            shutil.copy(path, copy)
    again = Index(copy / "index.db")
    assert stored(again.find("origin", b"k")) == record("one", b"k")
    again.close()


@pytest.mark.parametrize("content", [b"", b"no database at all" * 500, b"SQLite format 3\0" * 999])
def test_a_damaged_index_is_replaced_by_an_empty_one(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(content)
    index = Index(path)
    assert keys(index) == {}
    index.save([record("one", b"k")])
    index.close()
    assert ("unusable" in caplog.text) == bool(content)
    again = Index(path)
    assert keys(again) == {b"k": "one"}
    again.close()


def test_the_index_of_another_format_is_not_believed(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.db")
    index.save([record("one", b"k")])
    index._db.execute("PRAGMA user_version = 99")
    index.close()
    again = Index(tmp_path / "index.db")
    assert keys(again) == {}
    again.close()


# --- totals and pages ---------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("save"), names, st.integers(0, 9)),
        st.tuples(st.just("delete"), names, st.just(0)),
        st.tuples(st.just("shrink"), names, st.integers(0, 9)),
        st.tuples(st.just("move"), names, st.integers(0, 2)),
        st.tuples(st.just("pin"), names, st.just(0)),
        st.tuples(st.just("unpin"), names, st.just(0)),
    ),
    max_size=20,
)


@settings(deadline=None, derandomize=True, database=None)
@given(steps)
def test_the_totals_are_those_of_the_files(steps: list[tuple[str, str, int]]) -> None:
    index = Index(Path(":memory:"))
    for action, name, number in steps:
        key = name.encode()
        found = index.find("origin", key)
        if action == "save":
            pinned = index.is_pinned("origin", key)
            index.save([Record(name, "origin", key, b"v", 9, number, 1.0, pinned=pinned)])
        elif action == "delete":
            index.delete([name])
        elif action == "shrink" and found:
            index.change_blocks(found.row, {}, 0, number)
        elif action == "move":
            target = b"abc"[number : number + 1]
            if target != key:
                index.move("origin", key, target)
        elif action == "pin":
            index.pin("origin", key)
        elif action == "unpin":
            index.unpin("origin", key)
        files = index.page(0, 9)
        pinned_files = [file for file in files if file.pinned]
        for totals in index.totals():
            assert totals.files == len(files)
            assert totals.bytes == sum(file.cached_bytes for file in files)
            assert totals.pinned_files == len(pinned_files)
            assert totals.pinned_bytes == sum(file.cached_bytes for file in pinned_files)
        assert index.total_bytes() == sum(file.cached_bytes for file in files)
        assert all(file.pinned == index.is_pinned("origin", file.key) for file in files)
        assert {file.name for file in index.oldest((-1.0, 0), 9)} == {
            file.name for file in files if not file.pinned
        }
    index.close()


def test_the_chunks_of_what_goes_go_too(index: Index) -> None:
    index.save([record("one", b"k"), record("two", b"l")])
    index.delete(["one"])
    index.save([record("three", b"l")])
    assert index._db.execute("SELECT count(*) FROM chunks").fetchone() == (1,)


def test_pages_are_walked_to_their_end(index: Index) -> None:
    index.save([record(str(n), b"d/%d" % n) for n in range(5)] + [record("x", b"e")])
    seen, after = [], b""
    while page := index.page_under("origin", b"d", after, 2):
        seen += [found.name for found in page]
        after = page[-1].key
    assert seen == ["0", "1", "2", "3", "4"]
    assert len(index.page_under("origin", b"", b"", 9)) == 6
    assert [found.name for found in index.page(3, 9)] == ["3", "4", "x"]


def test_a_directory_is_known_whole_or_not_at_all(index: Index) -> None:
    large = Record("large", "origin", b"d/large", b"v", 1, 1, 1.0, 10**6, chunks={0: b"12345678"})
    index.save([record("a", b"d/a"), record("b", b"d/b"), large, record("c", b"e/c")])
    found = index.directory("origin", b"d", 3)
    assert found
    assert found.keys() == {b"d/a", b"d/b", b"d/large"}
    assert found[b"d/a"] == index.find("origin", b"d/a")
    assert not found[b"d/large"].is_complete
    assert index.directory("origin", b"d", 2) is None
    everything = index.directory("origin", b"", 9)
    assert everything
    assert len(everything) == 4


# --- pins ---------------------------------------------------------------------------------------


def test_a_pin_is_for_what_is_below_it_and_outlives_a_restart(tmp_path: Path) -> None:
    index = Index(tmp_path / "index.db")
    index.save([record("1", b"d/x"), record("2", b"d2")])
    index.pin("origin", b"d")
    assert index.is_pinned("origin", b"d/new/file")
    assert not index.is_pinned("another", b"d/x")
    index.close()
    index = Index(tmp_path / "index.db")
    assert index.pins() == [("origin", b"d")]
    assert [found.name for found in index.page(0, 9) if found.pinned] == ["1"]
    assert index.unpin("origin", b"d/x") == 0
    assert index.pin_over("origin", b"d/x") == b"d"
    assert index.unpin("origin", b"") == 1
    assert not any(found.pinned for found in index.page(0, 9))
    index.close()


def test_a_pin_follows_a_rename_and_goes_with_what_is_removed(index: Index) -> None:
    index.pin("origin", b"d/x")
    index.pin("origin", b"t")
    index.save([record("1", b"d/x"), record("2", b"other")])
    index.move("origin", b"d", b"e")
    assert index.is_pinned("origin", b"e/x")
    assert not index.is_pinned("origin", b"d/x")
    index.move("origin", b"other", b"t")  # as editors save
    assert index.is_pinned("origin", b"t")
    assert all(found.pinned for found in index.page(0, 9))
    index.remove("origin", b"e")
    assert index.pins() == [("origin", b"t")]


def test_a_transaction_that_fails_pins_nothing(index: Index) -> None:
    index._db.execute("PRAGMA max_page_count = 1")
    key = b"d" * 100_000
    with pytest.raises(sqlite3.Error, match="full"):
        index.pin("origin", key)
    assert not index.is_pinned("origin", key)


@pytest.mark.parametrize("step", ["move", "remove", "forget", "renew_version"])
def test_what_the_remote_has_done_is_noted_on_a_full_disk_too(
    index: Index, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """By an empty index, if need be; what can wait is an error."""
    index.pin("origin", b"k")
    index.save([record("one", b"k")])

    class Full:
        """The connection to a database on a full disk."""

        def execute(self, *_: object) -> None:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        def close(self) -> None:
            """There is nothing to close."""

    monkeypatch.setattr(index, "_db", Full())
    with pytest.raises(sqlite3.OperationalError, match="full"):
        index.save([record("two", b"k2")])
    calls = {
        "move": ("origin", b"k", b"l"),
        "remove": ("origin", b"k"),
        "forget": ("one",),
        "renew_version": ("origin", b"k", b"v1", b"v2"),
    }
    getattr(index, step)(*calls[step])
    assert index.generation == 1
    assert keys(index) == {}
    assert index.is_pinned("origin", b"l" if step == "move" else b"k") == (step != "remove")
