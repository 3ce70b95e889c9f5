"""What `hpcfs status --watch` draws; that it does is in tests/mount/test_write_commands.py."""

from __future__ import annotations

import click
import msgspec
import pytest

from hpcfs.cli import watch
from hpcfs.cli.pending import UnansweredMount
from hpcfs.control.control import MountStatus, NamespaceStatus, PendingFile, SiteStatus

MIB = 1024**2
BAD = PendingFile("home", "bad", 7, 7, "failed", 1.0, "x", "no\x1b[2J route\nhome")
BIG = PendingFile("home", "big", 100 * MIB, 75 * MIB, "uploading", 1.0, "y")
WAITING = [PendingFile("home", f"f{n}", 1, 1, "waiting", 1.0, f"w{n}") for n in range(40)]


def status(*pending: PendingFile, rate: float = 0.0, count: int | None = None) -> MountStatus:
    return MountStatus(
        mountpoint="/m",
        pid=7,
        version="0",
        started=1.5,
        log_file="/l",
        cache_dir="/c",
        cache_used=1,
        cache_size=2,
        open_files=3,
        dirty_files=4,
        namespaces=[
            NamespaceStatus("home", "sftp", "sftp://h/~", "connected", write="back"),
            NamespaceStatus("s", "s3", "s3://b", "failed", "gone\x1b[2J", read_only=True),
        ],
        pending=list(pending),
        pending_files=len(pending) if count is None else count,
        pending_bytes=sum(file.left for file in pending),
        pending_states={"failed": 1},
        uploaded_bytes=3 * MIB,
        upload_rate=rate,
    )


def drawn(
    *found: MountStatus | UnansweredMount, height: int = 24, rates: watch.Rates | None = None
) -> str:
    lines = watch.frame(found, rates or watch.Rates(), height)
    assert len(lines) <= height
    plain = [click.unstyle(line) for line in lines]
    assert all(line.isprintable() for line in plain), "what a remote says can't draw"
    return "\n".join(plain)


def test_a_frame_has_mounts_namespaces_and_files() -> None:
    shown = drawn(
        status(BAD, BIG, *WAITING[:2], rate=15 * MIB), UnansweredMount("/dead", "its\x1b daemon")
    )
    for text in (
        "\n/m  (mounted ",
        "  home  connected   write back     sftp://h/~\n",
        "  s     failed      read-only      s3://b: gone�[2J\n",
        "  uploads: 4 files (75.0 MiB) pending: 1 failed\n",
        "  uploaded: 3.0 MiB since the mount, 15.0 MiB/s, 5 s left\n",
        "    failed     home/bad  7 B, ",
        ": no�[2J route�home\n",
        "    uploading  home/big  [##--------]  25% of 100.0 MiB\n",
        "    waiting    home/f0  1 B\n",
        "/dead: its� daemon",
    ):
        assert text in shown, shown
    assert "no hpcfs mount" in drawn()


def test_a_frame_has_the_connections_of_each_site() -> None:
    sites = [
        SiteStatus(["home", "work\x1b"], "sftp", 1, 4, 32),
        SiteStatus(["s"], "s3", 18, 0, 1),
        SiteStatus(["idle"], "s3", 0, 0, 0),
    ]
    shown = drawn(msgspec.structs.replace(status(), sites=sites))
    assert "  1 SSH connection, 4 channels, 32 requests under way: home, work�\n" in shown
    assert "  18 S3 connections, 1 request under way: s\n" in shown
    assert "idle" not in shown


@pytest.mark.parametrize("height", [5, 12, 24, 60])
def test_a_frame_fits(height: int) -> None:
    files = [BAD, BIG, *WAITING]
    shown = drawn(status(*files, count=5000), height=height)
    named = sum(file.path in shown for file in files)
    if height > 9:
        assert f"and {5000 - named} more files" in shown
    assert ("home/bad" in shown) == (height > 10), "what failed comes first"


def test_rates_come_from_one_look_to_the_next() -> None:
    rates = watch.Rates()
    later = msgspec.structs.replace(BIG, left=BIG.left - 10 * MIB)
    rates.note([status(BIG)], 10.0)
    assert "MiB/s" not in drawn(status(BIG), rates=rates)
    rates.note([status(later), UnansweredMount("/dead", "gone")], 12.0)
    assert "] 35% of 100.0 MiB, 5.0 MiB/s" in drawn(status(later), rates=rates).replace("  ", " ")
    rates.note([status(BIG)], 14.0)
    assert "MiB/s" not in drawn(status(BIG), rates=rates), "it began again"
