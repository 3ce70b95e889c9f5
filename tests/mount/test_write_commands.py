"""What the user sees of uploads: sync, retry, discard, recover, status and umount.

Over real mounts of the stub daemon, whose backlog uploads as a test wants it; what the daemon does
with them is tested in tests/policy/test_write_handlers.py.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcfs.control import control
from hpcfs.control.control import MountStatus
from hpcfs.system import mountinfo, paths
from tests.support.backlog import make_journal, unconfirmed
from tests.support.command import Home, Terminal, end_mounts_below, make_home

NOW = 9e9
"""`since`, for files that this mount and no earlier one made."""
LARGE = 100_000_000
BAD = {"path": "dir/bad", "state": "failed", "size": 2048, "reason": "the quota\x1b[2J is used up"}
OLD = {"path": "old", "state": "kept", "size": 5, "reason": "killed", "data": "/c/kept/old"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    made = make_home(tmp_path.resolve())
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(made.path / "run"))
    yield made
    end_mounts_below(made.path)


def mount(home: Home, *rows: dict[str, object], rate: float = 0.0, **refuses: str) -> str:
    """What the command tells on stderr. Nothing goes up before a test waits for it."""
    result = home.run(
        *("mount", "--write", "back", "home=login3:", home.mountpoint),
        HPCFS_STUB_PENDING=json.dumps(rows),
        HPCFS_STUB_RATE=str(rate),
        HPCFS_STUB_WAITS="yes",
        HPCFS_STUB_REFUSES=json.dumps({f"home:{name}": why for name, why in refuses.items()}),
    )
    assert result.returncode == 0, result.stderr
    return result.stderr


def status(home: Home) -> MountStatus:
    return control.query_status(paths.find_socket(home.mountpoint))


def pending(home: Home) -> dict[str, str]:
    return {one.path: one.state for one in status(home).pending}


def is_mounted(home: Home) -> bool:
    return mountinfo.at(home.mountpoint, mountinfo.read()) is not None


def said(result: subprocess.CompletedProcess[str]) -> str:
    """On stderr; nothing of a remote may reach the terminal as it is."""
    assert "\x1b" not in result.stdout + result.stderr
    return result.stderr


# --- mount and status ---------------------------------------------------------------------------


def test_a_mount_tells_what_it_resumes(home: Home) -> None:
    told = mount(home, BAD, OLD, {"path": "a"})
    assert "hpcfs: 1 file of an earlier mount: the upload goes on\n" in told
    assert "hpcfs: 2 files could not be uploaded earlier: 'hpcfs status' says why\n" in told
    assert [one.write for one in status(home).namespaces] == ["back"]


def test_status_names_what_failed_and_counts_the_rest(home: Home) -> None:
    many: list[dict[str, object]] = [
        {**BAD, "path": f"bad{number}", "since": number} for number in range(30)
    ]
    waiting: list[dict[str, object]] = [{"path": f"f{number}"} for number in range(3000)]
    mount(home, *many, {**OLD, "since": 40}, *waiting)
    result = home.run("status", home.mountpoint)
    shown = result.stdout
    assert said(result) == ""
    assert "uploads: 3031 files (89.3 KiB) pending: 30 failed, 1 kept, 3000 waiting\n" in shown
    assert f"failed {home.mountpoint}/home/bad0 (2.0 KiB, " in shown
    assert "the quota�[2J is used up" in shown
    assert "and 11 more: " in shown
    assert "'hpcfs recover --to DIR'" in shown
    assert "/home/f0" not in shown
    assert shown.count("\n") < 40
    (found,) = json.loads(home.run("status", "--json", home.mountpoint).stdout)
    assert (found["pending_files"], len(found["pending"])) == (3031, 1000)
    assert [one["state"] for one in found["pending"][:31]] == ["failed"] * 30 + ["kept"]
    assert found["pending"][30]["data"] == "/c/kept/old"
    assert found["namespaces"][0]["write"] == "back"


def test_a_remote_that_is_the_root_has_no_name_in_paths(home: Home) -> None:
    result = home.run(
        *("mount", "login3:", home.mountpoint),
        HPCFS_STUB_PENDING=json.dumps([{**BAD, "namespace": "login3"}]),
    )
    assert result.returncode == 0
    assert f"failed {home.mountpoint}/dir/bad (" in home.run("status", home.mountpoint).stdout
    assert home.run("discard", "mnt/dir/bad", "--yes").returncode == 0
    assert "uploads: nothing is pending" in home.run("status", home.mountpoint).stdout


def test_watch_draws_until_q(home: Home) -> None:
    mount(home, BAD, {"path": "big", "size": LARGE}, rate=LARGE / 1000)
    terminal = Terminal(home, "status", "--watch", home.mountpoint)
    for text in ("write back", "home/dir/bad  2.0 KiB", "waiting    home/big"):
        terminal.wait_for(text)
    assert not terminal.echoes()
    with home.start("sync", "mnt") as syncing:
        terminal.wait_for("uploading  home/big  [")
        terminal.wait_for("KiB/s\x1b[K")
        syncing.kill()
    terminal.write("q")
    assert terminal.exit_code() == 0
    assert terminal.shown.endswith("\x1b[?1049l"), "the screen is as it was"


def test_watch_ends_with_ctrl_c_and_shows_mounts_that_come_and_go(home: Home) -> None:
    terminal = Terminal(home, "status", "--watch", home.mountpoint)
    terminal.wait_for("no hpcfs mount")
    mount(home, {"path": "a"})
    terminal.wait_for("uploads: 1 file (10 B) pending: 1 waiting")
    terminal.write("\x03")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.shown


def test_watch_that_is_terminated_leaves_the_terminal_as_it_was(home: Home) -> None:
    terminal = Terminal(home, "status", "--watch", home.mountpoint)
    terminal.wait_for("no hpcfs mount")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.exit_code() == 128 + signal.SIGTERM
    assert terminal.shown.endswith("\x1b[?1049l")


def test_watch_without_a_terminal_prints_one_status_a_second(home: Home) -> None:
    mount(home, BAD)
    with home.start("status", "--watch", "--json", home.mountpoint) as watching:
        assert watching.stdout is not None
        lines = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
    assert [one["pending_files"] for (one,) in lines] == [1, 1]


# --- sync ---------------------------------------------------------------------------------------


def test_sync_waits_for_a_path_or_for_all(home: Home) -> None:
    mount(home, {"path": "dir/a", "size": 3000}, {"path": "b", "size": 5000}, rate=10_000)
    result = home.run("sync", home.mountpoint / "home" / "dir")
    assert (result.returncode, said(result)) == (0, "")
    assert result.stdout == f"{home.mountpoint}/home/dir: uploaded 1 file (2.9 KiB)\n"
    assert "dir/a" not in pending(home)
    assert home.run("sync", "mnt").returncode == 0
    assert pending(home) == {}
    assert "nothing was pending" in home.run("sync", "mnt").stdout


def test_sync_fails_with_the_reason(home: Home) -> None:
    mount(home, {"path": "a"}, {"path": "b"}, rate=1000, a="no space left")
    result = home.run("sync", "mnt")
    assert (result.returncode, result.stdout) == (1, "")
    assert "home/a is not uploaded: no space left\n" in said(result)
    assert pending(home) == {"a": "failed"}
    assert home.run("sync", "mnt/nix").returncode == 1


def test_ctrl_c_ends_the_waiting_and_not_the_upload(home: Home) -> None:
    mount(home, {"path": "a", "size": LARGE}, {"path": "b"}, rate=LARGE / 1000)
    terminal = Terminal(home, "sync", "mnt")
    terminal.wait_for("/2 files")
    terminal.write("\x03")
    assert terminal.exit_code() == 130
    assert "2 files (" in terminal.shown
    assert "the mount goes on with that" in terminal.shown
    assert pending(home)["a"] == "uploading"


def test_a_daemon_that_is_gone_is_told(home: Home) -> None:
    mount(home)
    pid = status(home).pid
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([process], [], [], 10)
    os.close(process)
    for command in (["sync", "mnt"], ["retry", "mnt"], ["discard", "mnt"]):
        result = home.run(*command)
        assert result.returncode == 1
        assert "is gone: 'hpcfs umount" in said(result)


# --- retry, discard, recover --------------------------------------------------------------------


def test_retry_tries_again(home: Home) -> None:
    mount(home, BAD, OLD, rate=100_000)
    result = home.run("retry", "mnt/home/dir")
    assert (result.returncode, said(result)) == (0, "")
    assert result.stdout == f"{home.mountpoint}/home/dir: trying 1 file (2.0 KiB) again\n"
    assert home.run("sync", "mnt/home/dir").returncode == 0
    assert pending(home) == {"old": "kept"}
    assert "nothing had failed" in home.run("retry", "mnt/home/dir").stdout


def test_discard_asks_and_names_what_would_be_lost(home: Home) -> None:
    mount(home, BAD, OLD)
    result = home.run("discard", "mnt/home")
    assert (result.returncode, result.stdout) == (1, "")
    assert "2 files (2.0 KiB) would be lost" in said(result)
    for answer, code in (("\n", 1), ("n\n", 1), ("y\n", 0)):
        assert len(pending(home)) == 2
        terminal = Terminal(home, "discard", "mnt/home/dir")
        terminal.wait_for("[y/N]")
        assert "home/dir/bad (2.0 KiB, failed: the quota" in terminal.shown
        assert "old" not in terminal.shown
        terminal.write(answer)
        assert terminal.exit_code() == code
    assert pending(home) == {"old": "kept"}
    assert home.run("discard", "mnt/home/old", "--yes").returncode == 0
    assert pending(home) == {}
    assert "nothing of mnt waits" in said(home.run("discard", "mnt", "--yes"))


def test_what_is_still_written_is_not_discarded(home: Home) -> None:
    mount(home, {"path": "a", "state": "writing"})
    result = home.run("discard", "mnt", "--yes")
    assert result.returncode == 1
    assert "a program still writes to mnt" in said(result)
    assert pending(home) == {"a": "writing"}


def test_recover_copies_what_is_pending(home: Home) -> None:
    mount(home, BAD, OLD)
    result = home.run("recover", "mnt/home/dir", "--to", "out/here")
    assert (result.returncode, said(result)) == (0, "")
    assert f"copied 1 file (2.0 KiB) to {home.path}/out/here" in result.stdout
    assert len((home.path / "out/here/home/dir/bad").read_bytes()) == 2048
    assert home.run("recover", "mnt/home/dir", "--to", "out/here").returncode == 0
    assert len((home.path / "out/here/home/dir/bad.2").read_bytes()) == 2048
    assert pending(home) == {"dir/bad": "failed", "old": "kept"}
    result = home.run("recover", "--to", "mnt/x", "mnt")
    assert result.returncode == 1
    assert "is in the mount" in said(result)
    assert "nothing is waiting" in home.run("recover", "mnt/home/nix", "--to", "out").stdout


def test_recover_needs_no_mount(home: Home) -> None:
    cache = home.path / ".cache" / "hpcfs"
    directory = make_journal(
        cache,
        unconfirmed(cache, b"dir/new", b"new data"),
        unconfirmed(cache, b"part", bytes(9), base_size=9, ranges=[(3, 4)]),
    )
    directory.rename(cache / paths.mount_id(home.mountpoint))
    result = home.run("recover", "mnt/home/dir", "--to", "out")
    assert (result.returncode, said(result)) == (0, "")
    assert (home.path / "out/home/dir/new").read_bytes() == b"new data"
    result = home.run("recover", "--to", "all")
    assert result.returncode == 1
    assert "all/home/part.hpcfs-partial has only what was changed" in said(result)
    assert (home.path / "all/home/dir/new").read_bytes() == b"new data"
    assert "is in no mount" in said(home.run("recover", "elsewhere/x", "--to", "out"))


# --- umount -------------------------------------------------------------------------------------


def test_umount_waits_for_uploads(home: Home) -> None:
    mount(home, {"path": "a", "size": 3000}, {"path": "b", "size": 2000}, rate=10_000)
    terminal = Terminal(home, "umount", "mnt")
    terminal.wait_for("/2 files")
    terminal.wait_for("kB/s")
    assert is_mounted(home)
    assert terminal.exit_code() == 0
    assert not is_mounted(home)
    assert "hpcfs:" not in terminal.shown


def test_umount_without_a_terminal_says_what_it_waits_for(home: Home) -> None:
    mount(home, {"path": "a", "size": 40_000}, rate=10_000)
    result = home.run("umount", "mnt")
    assert (result.returncode, result.stdout) == (0, "")
    assert "waiting until all is uploaded: 1 file (" in said(result)


def test_a_refused_upload_does_not_keep_it_mounted(home: Home) -> None:
    mount(
        home,
        {"path": "a", "since": NOW},
        {"path": "b", "since": NOW},
        OLD,
        rate=1000,
        a="the quota is used up",
    )
    result = home.run("umount", "mnt")
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{home.mountpoint}/home/a is not uploaded: the quota is used up\n" in said(result)
    assert "1 file could not be uploaded and stay" in said(result)
    assert "old" not in said(result)
    assert not is_mounted(home)


def test_what_an_earlier_mount_left_is_no_news(home: Home) -> None:
    mount(home, BAD, OLD)
    result = home.run("umount", "mnt")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("seconds", ["0", "1.5"])
def test_umount_waits_no_longer_than_its_timeout(home: Home, seconds: str) -> None:
    mount(home, {"path": "a", "size": LARGE}, rate=LARGE / 1000)
    pid = status(home).pid
    with control.open_wait(paths.find_socket(home.mountpoint)) as daemon:
        result = home.run("umount", "--timeout", seconds, "mnt")
        assert (result.returncode, result.stdout) == (3, "")
        assert "is unmounted, but there was no time to wait, 1 file (" in said(result)
        assert "the next mount resumes" in said(result)
        assert not is_mounted(home)
        assert not control.wait_until_gone(daemon, 0), "it goes on"
        os.kill(pid, signal.SIGKILL)
        assert control.wait_until_gone(daemon, 10)


def test_a_timeout_that_suffices_is_no_failure(home: Home) -> None:
    mount(home, {"path": "a", "size": 3000}, rate=10_000)
    result = home.run("umount", "--timeout", "30", "mnt")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    mount(home)
    assert home.run("umount", "--timeout", "0", "mnt").returncode == 0
    assert home.run("umount", "--timeout", "soon", "mnt").returncode == 2


def test_ctrl_c_at_umount_leaves_it_mounted(home: Home) -> None:
    mount(home, {"path": "a", "size": LARGE}, rate=LARGE / 1000)
    terminal = Terminal(home, "umount", "mnt")
    terminal.wait_for("/1 files")
    terminal.write("\x03")
    assert terminal.exit_code() == 130
    assert "stays mounted, 1 file (" in terminal.shown
    assert is_mounted(home)


def test_who_uses_the_mount_is_told_before_the_wait_is_over(home: Home) -> None:
    mount(home, {"path": "a", "size": 40_000}, rate=10_000)
    with (home.mountpoint / "file").open():
        result = home.run("umount", "mnt")
    assert result.returncode == 1
    first, _, second = said(result).partition("waiting until")
    assert f"(pid {os.getpid()}): end them" in first
    assert f"(pid {os.getpid()}): end them" in second
    assert is_mounted(home)


# --- sync --timeout -----------------------------------------------------------------------------


def test_sync_waits_no_longer_than_its_timeout(home: Home) -> None:
    mount(home, {"path": "a", "size": LARGE}, rate=LARGE / 1000)
    result = home.run("sync", "--timeout", "1", "mnt")
    assert (result.returncode, result.stdout) == (3, "")
    assert "still to be uploaded; the mount goes on with that" in said(result)
    assert is_mounted(home)
