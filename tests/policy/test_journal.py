"""The journal: a crash at any moment leaves a file's bytes where the next mount finds them."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import trio

from hpcfs.content.record import Unconfirmed
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Attributes, Entry
from hpcfs.writeback.journal import Journal, recover

DATA = b"bytes that no remote has"


def crashed(directory: Path, into: Path) -> Path:
    """The cache directory as a daemon killed at this moment leaves it (hard links included)."""
    subprocess.run(["cp", "-a", directory, into], check=True)
    os.unlink(into / "journal.db-shm")  # Path.unlink may be patched
    return into


def reopened(directory: Path) -> list[Unconfirmed]:
    """What the next mount finds there."""
    journal = Journal.open(directory)
    rows = journal.rows
    trio.run(journal.close)
    return rows


ENTRY = Entry("ä".encode("latin-1"), stat.S_IFREG | 0o640, 24, 5 * 10**9, 4 * 10**9, 1, 2, b"v")
ABILITIES = Capabilities(
    partial_writes=True, creates_on_upload=False, handles=True, mtime_resolution_ns=10**9
)


def row(directory: Path, name: str = "cafe", **changes: object) -> Unconfirmed:
    data = directory / "data" / name[:2] / name
    data.parent.mkdir(exist_ok=True, parents=True)
    if not data.exists():
        data.write_bytes(DATA)
    made = Unconfirmed(
        name,
        "ns",
        "ssh:x",
        "häuser/ä".encode("latin-1"),
        len(DATA),
        3,
        [(0, 4), (9, 24)],
        str(data),
        b"v1",
        ENTRY,
        ABILITIES,
        Attributes(mode=0o600),
        new=True,
        attempted=True,
        since=7.5,
    )
    return msgspec.structs.replace(made, **changes)


def moved(noted: Unconfirmed, old: Path, new: Path) -> Unconfirmed:
    return msgspec.structs.replace(noted, data=noted.data.replace(str(old), str(new)))


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


@pytest.mark.slow
@pytest.mark.parametrize("durable", [False, True])
def test_a_crash_while_a_file_is_open_leaves_all_that_was_noted(
    home: Path, tmp_path: Path, durable: bool
) -> None:
    noted = row(home)

    async def story(journal: Journal) -> None:
        await journal.note(msgspec.structs.replace(noted, ranges=[]))
        await journal.note(noted, durable=durable)
        crashed(home, tmp_path / "crash")

    run(home, story)
    (found,) = reopened(tmp_path / "crash")
    assert found == moved(noted, home, tmp_path / "crash")
    assert Path(found.data).read_bytes() == DATA


def test_the_first_note_tells_since_when(home: Path) -> None:
    noted = row(home, since=0.0)

    async def story(journal: Journal) -> None:
        await journal.note(noted)
        first = journal.rows[0].since
        assert first > 0
        await journal.note(msgspec.structs.replace(noted, size=1))
        assert journal.rows[0].since == first

    run(home, story)


def test_what_is_durable_is_synced_before_its_row_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes, the directory that names them, then the row."""
    steps: list[str] = []
    noted = row(home)
    real = os.fsync

    def fsync(fd: int) -> None:
        steps.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    async def story(journal: Journal) -> None:
        journal._db.set_trace_callback(steps.append)
        await journal.note(noted, durable=True)

    monkeypatch.setattr(os, "fsync", fsync)
    run(home, story)
    assert steps[:3] == [noted.data, str(Path(noted.data).parent), "PRAGMA synchronous = FULL"]
    assert any(step.startswith("INSERT") for step in steps[3:])


def test_what_was_confirmed_is_synced_too(home: Path) -> None:
    """Its bytes may be evicted: the row must not come back after a loss of power."""
    steps: list[str] = []

    async def story(journal: Journal) -> None:
        await journal.note(row(home), durable=True)
        await journal.confirm("cafe")
        journal._db.set_trace_callback(steps.append)
        await journal.sync()
        assert "PRAGMA synchronous = FULL" in steps
        steps.clear()
        await journal.sync()
        assert steps == []

    run(home, story)


@pytest.mark.slow
def test_a_row_replaces_another_in_one_step(home: Path, tmp_path: Path) -> None:
    async def story(journal: Journal) -> None:
        await journal.note(row(home, "aaaa", path=b"target"))
        await journal.note(row(home, "bbbb", path=b"temporary"))
        await journal.note(row(home, "bbbb", path=b"target"), instead_of="aaaa")
        assert [found.name for found in journal.rows] == ["bbbb"]
        crashed(home, tmp_path / "crash")

    run(home, story)
    assert [(f.name, f.path) for f in reopened(tmp_path / "crash")] == [("bbbb", b"target")]


@pytest.mark.slow
def test_after_the_confirmation_there_is_nothing(home: Path, tmp_path: Path) -> None:
    async def story(journal: Journal) -> None:
        await journal.note(row(home))
        await journal.confirm("cafe")
        crashed(home, tmp_path / "crash")

    run(home, story)
    assert reopened(tmp_path / "crash") == []
    assert (tmp_path / "crash" / "data" / "ca" / "cafe").exists()


class _Killed(BaseException):
    """Stands for the end of the process."""


STEPS: dict[str, tuple[type, str]] = {
    "before the link": (Path, "hardlink_to"),
    "before the row": (Journal, "_write"),
    "before the unlink": (Path, "unlink"),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_of_keeping_loses_nothing(
    home: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = row(home)

    def killed(*_: object, **__: object) -> None:
        crashed(home, tmp_path / "crash")
        raise _Killed

    async def strand(journal: Journal) -> None:
        await journal.note(noted)
        with monkeypatch.context() as patch:
            patch.setattr(*STEPS[step], killed)
            with pytest.raises(_Killed):
                journal._strand_now(msgspec.structs.replace(noted, reason="refused"))

    run(home, strand)
    (found,) = reopened(tmp_path / "crash")
    assert Path(found.data).read_bytes() == DATA
    assert found.is_stranded == (step == "before the unlink")
    assert found.reason == ("refused" if found.is_stranded else "")
    left = [path.name for path in (tmp_path / "crash" / "kept").iterdir()]
    assert left == (["cafe"] if found.is_stranded else [])


def test_what_is_kept_stays_kept_over_mounts_with_its_reason(home: Path) -> None:
    async def story(journal: Journal) -> None:
        noted = row(home)
        await journal.note(noted)
        await journal.strand(msgspec.structs.replace(noted, reason="the quota is used up"))
        assert [kept.reason for kept in journal.stranded] == ["the quota is used up"]

    run(home, story)
    assert list((home / "data" / "ca").iterdir()) == []
    for _ in range(3):
        (kept,) = reopened(home)
        assert (kept.is_stranded, kept.reason) == (True, "the quota is used up")
        assert Path(kept.data).read_bytes() == DATA


def test_what_is_discarded_is_gone(home: Path) -> None:
    async def story(journal: Journal) -> None:
        await journal.note(row(home))
        await journal.strand(row(home, reason="refused"))
        await journal.discard("cafe")

    run(home, story)
    assert list((home / "kept").iterdir()) == []
    assert reopened(home) == []


def test_recovering_copies_the_local_version(home: Path, tmp_path: Path) -> None:
    noted = row(home, size=30)
    assert recover(noted, tmp_path / "copy") == 30
    assert (tmp_path / "copy").read_bytes() == DATA + bytes(6)
    assert (tmp_path / "copy").stat().st_mtime_ns == ENTRY.mtime_ns


def test_a_row_whose_bytes_are_gone_is_told_and_dropped(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(journal: Journal) -> None:
        await journal.note(row(home))

    run(home, story)
    (home / "data" / "ca" / "cafe").unlink()
    assert reopened(home) == []
    assert "are gone" in caplog.text
    caplog.clear()
    assert reopened(home) == []
    assert not caplog.records


def test_a_journal_of_another_format_is_refused_and_left_alone(home: Path) -> None:
    run(home, lambda journal: journal.note(row(home)))
    db = sqlite3.connect(home / "journal.db")
    db.execute("PRAGMA user_version = 99")
    db.execute(f"PRAGMA application_id = {0x68706600 | 99}")
    db.close()
    with pytest.raises(sqlite3.DatabaseError, match="format is 99"):
        Journal.open(home)


def test_many_files_are_kept_apart(home: Path) -> None:
    async def story(journal: Journal) -> None:
        for number in range(20):
            await journal.note(row(home, f"name{number}", path=b"p%d" % number))

    run(home, story)
    assert {found.path for found in reopened(home)} == {b"p%d" % number for number in range(20)}
