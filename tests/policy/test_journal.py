"""The journal: a crash at any moment leaves a file's bytes where the next mount finds them."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from hpcfs.writeback.journal import Journal, Unconfirmed

DATA = b"bytes that no remote has"


def crashed(directory: Path, into: Path) -> Path:
    """The cache directory as a daemon killed at this moment leaves it (hard links included)."""
    shutil.copytree(directory, into, ignore=shutil.ignore_patterns("*-shm"))
    return into


def opened_again(directory: Path, original: Path) -> list[Unconfirmed]:
    """What the next mount finds; rows name absolute paths, so these are moved to the copy."""
    db = sqlite3.connect(directory / "journal.db")
    db.execute("UPDATE files SET data = replace(data, ?, ?)", (str(original), str(directory)))
    db.commit()
    db.close()
    return reopened(directory)


def reopened(directory: Path) -> list[Unconfirmed]:
    journal = Journal.open(directory)
    kept = journal.kept
    trio.run(journal.close)
    return kept


def row(directory: Path, name: str = "cafe", **changes: object) -> Unconfirmed:
    data = directory / "data" / name
    data.parent.mkdir(exist_ok=True)
    if not data.exists():
        data.write_bytes(DATA)
    path = "häuser/ä".encode("latin-1")
    made = Unconfirmed(name, "ns", path, len(DATA), 3, [(0, 4), (9, 24)], str(data))
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def run(directory: Path, story: Callable[[Journal], object]) -> None:
    async def main() -> None:
        journal = Journal.open(directory)
        await story(journal)  # type: ignore[misc]
        await journal.close()

    trio.run(main)


def test_a_crash_while_a_file_is_open_keeps_its_bytes(home: Path, tmp_path: Path) -> None:
    noted = row(home)

    async def story(journal: Journal) -> None:
        await journal.note(msgspec.structs.replace(noted, ranges=[]))
        await journal.note(noted)
        crashed(home, tmp_path / "crash")

    run(home, story)
    (kept,) = opened_again(tmp_path / "crash", home)
    assert (kept.namespace, kept.path, kept.size, kept.base_size) == ("ns", noted.path, 24, 3)
    assert kept.ranges == [(0, 4), (9, 24)]
    assert "before the remote confirmed" in kept.reason
    assert kept.since > 0
    assert Path(kept.data).parent == tmp_path / "crash" / "kept"
    assert Path(kept.data).read_bytes() == DATA
    assert list((tmp_path / "crash" / "data").iterdir()) == []
    assert reopened(tmp_path / "crash") == [kept]


def test_after_the_confirmation_there_is_nothing(home: Path, tmp_path: Path) -> None:
    async def story(journal: Journal) -> None:
        await journal.note(row(home))
        await journal.confirm("cafe")
        crashed(home, tmp_path / "crash")

    run(home, story)
    assert opened_again(tmp_path / "crash", home) == []
    assert (tmp_path / "crash" / "data" / "cafe").exists()


class _Killed(BaseException):
    """Stands for the end of the process."""


STEPS: dict[str, tuple[type, str]] = {
    "before the link": (Path, "hardlink_to"),
    "before the row": (Journal, "_write"),
    "before the unlink": (Path, "unlink"),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_of_keeping_loses_nothing(
    home: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = row(home)

    async def note(journal: Journal) -> None:
        await journal.note(noted)

    run(home, note)

    def killed(*_: object) -> None:
        crashed(home, tmp_path / "crash")
        raise _Killed

    async def keep(journal: Journal) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], killed)
            with pytest.raises(_Killed):
                journal._keep_now(msgspec.structs.replace(noted, reason="refused"))

    # An open journal would keep the file first: this one is opened before the row was there.
    db = sqlite3.connect(home / "journal.db", isolation_level=None)
    journal = Journal(home, db)
    trio.run(keep, journal)
    db.close()
    (kept,) = opened_again(tmp_path / "crash", home)
    assert Path(kept.data).read_bytes() == DATA
    assert Path(kept.data).parent.name == "kept"
    if step == "before the unlink":  # the second name is a stray, which the cache removes
        assert kept.reason == "refused"
    else:
        assert list((tmp_path / "crash" / "data").iterdir()) == []


def test_what_is_kept_stays_kept_over_mounts_with_its_reason(home: Path) -> None:
    async def story(journal: Journal) -> None:
        noted = row(home)
        await journal.note(noted)
        await journal.keep(msgspec.structs.replace(noted, reason="the quota is used up"))
        assert [kept.reason for kept in journal.kept] == ["the quota is used up"]

    run(home, story)
    for _ in range(3):
        (kept,) = reopened(home)
        assert kept.reason == "the quota is used up"
        assert Path(kept.data).read_bytes() == DATA


def test_a_row_whose_bytes_are_gone_is_told_and_dropped(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(journal: Journal) -> None:
        await journal.note(row(home))

    run(home, story)
    (home / "data" / "cafe").unlink()
    assert reopened(home) == []
    assert "are gone" in caplog.text
    caplog.clear()
    assert reopened(home) == []
    assert not caplog.records


def test_many_files_are_kept_apart(home: Path) -> None:
    async def story(journal: Journal) -> None:
        for number in range(20):
            await journal.note(row(home, f"name{number}", path=b"p%d" % number))

    run(home, story)
    assert {kept.path for kept in reopened(home)} == {b"p%d" % number for number in range(20)}
