"""The cache's index: what it remembers, across restarts, kills and damage."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcfs.cache.index import Index, Record

LATIN1 = "häuser/ä".encode("latin-1")


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    opened = Index(tmp_path / "index.db")
    yield opened
    opened.close()


def record(name: str, key: bytes, *, used: float = 1.0, size: int = 100) -> Record:
    return Record(name, "origin", key, b"v1", size, size, used, {0: b"12345678"})


def keys(index: Index) -> dict[bytes, str]:
    rows = index._db.execute("SELECT key, name FROM files").fetchall()
    return {bytes(key): name for key, name in rows}


def test_what_was_saved_is_found(index: Index) -> None:
    saved = record("one", LATIN1)
    assert index.save([saved]) == []
    assert index.find("origin", LATIN1) == saved
    assert index.find("another", LATIN1) is None
    assert index.find("origin", b"other") is None
    assert index.names() == {"one"}
    assert index.total_bytes() == 100


def test_another_file_of_the_same_key_replaces(index: Index) -> None:
    index.save([record("one", b"k")])
    assert index.save([record("two", b"k")]) == ["one"]
    assert keys(index) == {b"k": "two"}


def test_chunks_are_added_to_those_known(index: Index) -> None:
    index.save([record("one", b"k")])
    index.save([Record("one", "origin", b"k", b"v2", 7, 7, 2.0, {3: b"abcdefgh"})])
    found = index.find("origin", b"k")
    assert found
    assert found.chunks == {0: b"12345678", 3: b"abcdefgh"}
    assert found.version == b"v2"


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
    assert [name for name, _, _ in index.oldest(-1.0, 3)] == ["4", "3", "2"]
    assert [name for name, _, _ in index.oldest(8.0, 3)] == ["1", "0"]


def test_a_new_version_is_taken_only_for_the_one_that_was_meant(index: Index) -> None:
    index.save([record("one", b"k")])
    index.renew_version("origin", b"k", b"v0", b"v9")
    index.renew_version("origin", b"k", b"v1", b"v2")
    found = index.find("origin", b"k")
    assert found
    assert found.version == b"v2"


def test_a_failed_transaction_changes_nothing(index: Index) -> None:
    index.save([record("one", b"k")])
    broken = Record("two", "origin", b"k", b"v", 1, 1, 1.0, {0: object()})  # type: ignore[dict-item]
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
    assert again.find("origin", b"k") == record("one", b"k")
    again.close()


@pytest.mark.parametrize("content", [b"", b"no database at all" * 500, b"SQLite format 3\0" * 999])
def test_a_damaged_index_is_replaced_by_an_empty_one(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "index.db"
    path.write_bytes(content)
    index = Index(path)
    assert index.names() == set()
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
    assert again.names() == set()
    again.close()
