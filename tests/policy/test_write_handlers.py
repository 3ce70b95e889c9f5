"""What is not uploaded, for the user: which files a path means, and that copies harm nothing."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import trio

from hpcfs.config import config
from hpcfs.config.config import Settings
from hpcfs.control.control import (
    MAX_PENDING,
    MAX_REPLY_BYTES,
    ControlReply,
    ControlRequest,
    Outcome,
    WorkProgress,
)
from hpcfs.daemon import cache_commands, write_commands
from hpcfs.daemon.write_commands import WriteCommands
from hpcfs.model.errors import SetupError
from tests.support.backlog import FakeBacklog, content, make_journal, row, unconfirmed

ROWS = [
    row("a", "kept", size=1, since=5.0, reason="quota", data="/c/a"),
    row("dir/one", "waiting", size=20, since=3.0),
    row("dir/two", "failed", size=30, since=4.0, reason="no route"),
    row("dir.old/x", "uploading", size=40),
    row("a", "writing", namespace="data", size=50),
    row(b"\xff\n", "waiting", namespace="data", size=60),
    row("left", "kept", namespace="gone", size=70, since=2.0, reason="killed", data="/c/l"),
]


def settings(*, root: str | None = None) -> Settings:
    chosen = config.with_urls(config.Config({}), [("home", "h:"), ("data", "s3://b")])
    chosen = replace(chosen, root_namespace=root)
    return config.settings(chosen, Path("/m"), Path("/c"))


def ask(
    backlog: FakeBacklog,
    request: ControlRequest,
    *,
    root: str | None = None,
    meanwhile: Callable[[], Awaitable[None]] | None = None,
    steps: list[WorkProgress] | None = None,
) -> ControlReply:
    """The answer; `meanwhile` goes on until then."""
    service = WriteCommands(settings(root=root), backlog)

    async def tell(*fields: int) -> None:
        if steps is not None:
            steps.append(WorkProgress(*fields))

    async def run() -> ControlReply:
        async with trio.open_nursery() as nursery:
            if meanwhile is not None:
                nursery.start_soon(meanwhile)
            try:
                return await service.answer(request, tell)
            finally:
                nursery.cancel_scope.cancel()

    try:
        return trio.run(run)
    except* SetupError as refused:
        error = refused.exceptions[0]
    raise error


def paths(reply: ControlReply) -> list[str]:
    assert reply.pending is not None
    return [f"{one.namespace}/{one.path}" for one in reply.pending.files]


# --- which files --------------------------------------------------------------------------------


def test_what_failed_is_named_first() -> None:
    reply = ask(FakeBacklog(ROWS), ControlRequest("pending"))
    assert reply.pending is not None
    assert paths(reply) == [
        "home/dir/two",
        "gone/left",
        "home/a",
        "home/dir.old/x",
        "data/�\n",
        "home/dir/one",
        "data/a",
    ]
    assert (reply.pending.count, reply.pending.size, reply.pending.left) == (7, 271, 221)
    assert reply.pending.states == {
        "kept": 2, "waiting": 2, "failed": 1, "uploading": 1, "writing": 1,
    }  # fmt: skip
    assert reply.pending.stuck == 3
    kept = reply.pending.files[2]
    assert (kept.state, kept.reason, kept.data) == ("kept", "quota", "/c/a")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (b"home", {"home/a", "home/dir/one", "home/dir/two", "home/dir.old/x"}),
        (b"home/dir", {"home/dir/one", "home/dir/two"}),
        (b"home/dir/one", {"home/dir/one"}),
        (b"home/di", set()),
        (b"data/\xff\n", {"data/�\n"}),
        (b"gone", {"gone/left"}),
    ],
)
def test_a_path_means_a_file_or_all_below(path: bytes, expected: set[str]) -> None:
    assert set(paths(ask(FakeBacklog(ROWS), ControlRequest("pending", path)))) == expected


def test_a_remote_that_is_the_root_has_no_name_in_paths() -> None:
    backlog = FakeBacklog(ROWS)
    assert set(paths(ask(backlog, ControlRequest("pending", b"dir"), root="home"))) == {
        "home/dir/one",
        "home/dir/two",
    }
    ask(backlog, ControlRequest("retry", b"gone/left"), root="home")
    assert backlog.rows["gone:left"].state == "waiting"


def test_an_answer_stays_small_however_much_is_pending() -> None:
    rows = [row(f"f{number}", since=float(number)) for number in range(3 * MAX_PENDING)]
    rows.append(row("bad", "failed", since=1e9))
    found = write_commands.summary(rows)
    assert (len(found.files), found.count) == (MAX_PENDING, len(rows))
    assert [one.path for one in found.files[:3]] == ["bad", "f0", "f1"]


def test_an_answer_stays_small_however_long_names_are() -> None:
    rows = [row(b"%d" % number + b"\1" * 4090) for number in range(MAX_PENDING)]
    found = write_commands.summary(rows)
    assert len(msgspec.json.encode(found)) < MAX_REPLY_BYTES
    assert 100 < len(found.files) < found.count == MAX_PENDING


# --- sync, retry, discard -----------------------------------------------------------------------


def test_sync_returns_when_the_remote_has_it_and_counts_on_the_way() -> None:
    backlog = FakeBacklog([row("dir/a", size=100), row("dir/b", size=50), row("c")], rate=1000)
    steps: list[WorkProgress] = []
    reply = ask(
        backlog, ControlRequest("sync", b"home/dir"), meanwhile=backlog.upload_forever, steps=steps
    )
    assert reply.outcome == Outcome(2, 150)
    assert backlog.synced == [("home", b"dir")]
    assert steps[0] == WorkProgress(0, 150, 0, 2)
    assert steps[-1] == WorkProgress(150, 150, 2, 2)
    assert not backlog.rows.keys() & {"home:dir/a", "home:dir/b"}


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        (b"", None, (None, b"")),
        (b"", "home", (None, b"")),
        (b"home", None, ("home", b"")),
        (b"home/x/y", None, ("home", b"x/y")),
        (b"data/x", "home", ("home", b"data/x")),
    ],
)
def test_sync_of_a_path(path: bytes, root: str | None, expected: tuple[str | None, bytes]) -> None:
    backlog = FakeBacklog([])
    assert ask(backlog, ControlRequest("sync", path), root=root).outcome == Outcome()
    assert backlog.synced == [expected]


def test_sync_tells_what_failed() -> None:
    backlog = FakeBacklog([row("a"), row("b", size=20)], rate=1000)
    backlog.refuses["home:b"] = "the quota is used up"
    with pytest.raises(SetupError, match=r"home/b is not uploaded: the quota is used up$"):
        ask(backlog, ControlRequest("sync"), meanwhile=backlog.upload_forever)
    assert set(backlog.rows) == {"home:b"}
    with pytest.raises(SetupError, match="no namespace typo"):
        ask(backlog, ControlRequest("sync", b"typo/x"))


class Forgetful(FakeBacklog):
    async def sync(self, *_: object) -> None:
        """Says nothing of what is kept: nothing of it is on its way."""


def test_sync_does_not_take_what_is_kept_for_uploaded() -> None:
    backlog = Forgetful(ROWS)
    with pytest.raises(SetupError, match="home/a is not uploaded: quota; 3 files in all"):
        ask(backlog, ControlRequest("sync"))
    with pytest.raises(SetupError, match=r"home/dir/two is not uploaded: no route$"):
        ask(backlog, ControlRequest("sync", b"home/dir"))
    assert ask(backlog, ControlRequest("sync", b"home/dir/one")).outcome == Outcome()


def test_retry_takes_only_what_failed() -> None:
    backlog = FakeBacklog(ROWS)
    assert ask(backlog, ControlRequest("retry", b"home")).outcome == Outcome(2, 31)
    assert backlog.rows["home:dir/two"].state == "waiting"
    assert backlog.rows["home:dir.old/x"].state == "uploading"
    assert backlog.rows["gone:left"].state == "kept"
    assert ask(backlog, ControlRequest("retry", b"home")).outcome == Outcome()
    assert ask(backlog, ControlRequest("retry")).outcome == Outcome(1, 70)


def test_discard_takes_nothing_that_the_user_was_not_shown() -> None:
    backlog = FakeBacklog(ROWS)
    assert ask(backlog, ControlRequest("discard", b"home/dir", before=3.5)).outcome == Outcome(
        1, 20
    )
    assert "home:dir/two" in backlog.rows
    with pytest.raises(SetupError, match="nothing of it is pending"):
        ask(backlog, ControlRequest("discard", b"home/dir"))
    with pytest.raises(SetupError, match="still has it open"):
        ask(backlog, ControlRequest("discard", b"data", before=9.0))
    assert set(backlog.rows) == {one.id for one in ROWS} - {"home:dir/one"}


# --- recover ------------------------------------------------------------------------------------


def below(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def recover(backlog: FakeBacklog, to: Path, path: bytes = b"") -> Outcome:
    outcome = ask(backlog, ControlRequest("recover", path, to=os.fsencode(to))).outcome
    assert outcome is not None
    return outcome


def test_recover_copies_all_and_overwrites_nothing(tmp_path: Path) -> None:
    backlog = FakeBacklog(ROWS)
    to = tmp_path / "new" / "to"
    assert recover(backlog, to, b"home") == Outcome(4, 91)
    (to / "home" / "a").write_bytes(b"mine")
    assert recover(backlog, to, b"home/a") == Outcome(1, 1)
    assert recover(backlog, to, b"home/a") == Outcome(1, 1)
    assert recover(backlog, to, b"data/\xff\n") == Outcome(1, 60)
    by_name = {f"{one.namespace}/{os.fsdecode(one.path)}": content(one) for one in ROWS}
    assert below(to) == {
        "home/a": b"mine",
        "home/a.2": b"a",
        "home/a.3": b"a",
        **{name: by_name[name] for name in ("home/dir/one", "home/dir/two", "home/dir.old/x")},
        "data/\udcff\n": by_name["data/\udcff\n"],
    }
    assert len(backlog.rows) == len(ROWS), "it stays pending"
    assert recover(backlog, to, b"home/nothing") == Outcome()


def test_a_copy_that_fails_leaves_no_half_file(tmp_path: Path) -> None:
    backlog = FakeBacklog([row("a")])
    backlog.refuses["home:a"] = "the rest of it can't be fetched"
    with pytest.raises(SetupError, match="can't be fetched"):
        recover(backlog, tmp_path)
    assert below(tmp_path) == {}


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SetupError, match="the local disk failed"):
        recover(FakeBacklog([row("a")]), tmp_path / "file")


@pytest.mark.parametrize("path", [b"../x", b"a/../../x", b"", b"a//b", b"a\0b", b"."])
def test_no_copy_leaves_its_directory(tmp_path: Path, path: bytes) -> None:
    with pytest.raises(SetupError, match="no path that can be copied"):
        write_commands.make_target(tmp_path / "to", "home", path)
    with pytest.raises(SetupError, match="no path that can be copied"):
        write_commands.make_target(tmp_path / "to", "..", b"x")
    assert below(tmp_path) == {}


def test_links_are_not_followed_and_files_do_not_become_directories(tmp_path: Path) -> None:
    to, elsewhere = tmp_path / "to", tmp_path / "elsewhere"
    (to / "home").mkdir(parents=True)
    elsewhere.mkdir()
    (to / "home" / "dir").symlink_to(elsewhere)
    (to / "home" / "file").symlink_to(elsewhere / "absent")
    (to / "home" / "was").write_bytes(b"a file")
    made = [
        write_commands.make_target(to, "home", path)
        for path in (b"dir/x", b"file", b"was/y", b"was/z")
    ]
    assert [str(one.relative_to(to / "home")) for one in made] == [
        "dir.2/x",
        "file.2",
        "was.2/y",
        "was.2/z",
    ]
    assert not list(elsewhere.iterdir())


def test_the_longest_names_can_be_numbered(tmp_path: Path) -> None:
    names = {write_commands.make_target(tmp_path, "n", b"x" * 255).name for _ in range(3)}
    assert len(names) == 3
    assert write_commands.make_target(
        tmp_path, "n", b"x" * 255, write_commands.PARTIAL
    ).name.endswith(write_commands.PARTIAL)


# --- not mounted --------------------------------------------------------------------------------


def recover_unmounted(directory: Path, path: bytes, to: Path) -> tuple[Outcome, list[Path]]:
    return write_commands.recover_unmounted(directory, path, os.fsencode(to), lambda _: None)


def test_a_journal_that_nobody_mounts_can_be_recovered(tmp_path: Path) -> None:
    home, to = tmp_path / "cache", tmp_path / "to"
    directory = make_journal(
        home,
        unconfirmed(home, b"dir/new", b"new"),
        unconfirmed(home, b"other", b"other"),
        unconfirmed(home, b"dir/x", b"data", namespace="data"),
    )
    assert recover_unmounted(directory, b"home/dir", to) == (Outcome(1, 3), [])
    assert below(to) == {"home/dir/new": b"new"}
    assert recover_unmounted(directory, b"", tmp_path / "all")[0] == Outcome(3, 12)
    assert recover_unmounted(directory, b"dir", tmp_path / "root")[0] == Outcome(2, 7), (
        "the mount may have had one of them as its root"
    )
    assert recover_unmounted(directory, b"no", to) == (Outcome(), [])
    assert (directory / "lock").read_text() == "the mount at /m (pid 1)"


def test_a_copy_of_what_was_changed_does_not_pass_for_the_file(tmp_path: Path) -> None:
    home, to = tmp_path / "cache", tmp_path / "to"
    data = bytes(8) + b"new" + bytes(9)
    directory = make_journal(
        home,
        unconfirmed(home, b"changed", data, base_size=20, ranges=[(8, 11)]),
        unconfirmed(home, b"all", data, base_size=20, ranges=[(10, 20), (0, 10)]),
        unconfirmed(home, b"holes", data, base_size=0, ranges=[(8, 11)]),
        unconfirmed(home, b"cut", data, base_size=50, ranges=[(0, 20)]),
    )
    outcome, partial = recover_unmounted(directory, b"", to)
    assert outcome.files == 4
    assert partial == [to / "home" / "changed.hpcfs-partial"]
    assert below(to) == {
        f"home/{name}": data for name in ("changed.hpcfs-partial", "all", "holes", "cut")
    }


def test_a_cache_in_use_is_left_alone(tmp_path: Path) -> None:
    directory = make_journal(tmp_path / "cache", unconfirmed(tmp_path / "cache", b"x", b"x"))

    async def hold() -> None:
        async with cache_commands.unmounted(directory, "hpcfs cache"):
            with pytest.raises(SetupError, match="in use by 'hpcfs cache'"):
                await trio.to_thread.run_sync(recover_unmounted, directory, b"", tmp_path / "to")

    trio.run(hold)
    assert recover_unmounted(directory, b"", tmp_path / "to")[0] == Outcome(1, 1)
