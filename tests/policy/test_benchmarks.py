"""What the benchmark says of its measurements: tables, goals and the chart, from fixed values."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from scripts.benchmarks import (
    chart,
    goals,
    measure,
    peers,
    report,
    results,
    servers,
    writer,
    writes,
)
from scripts.benchmarks.files import Files
from scripts.benchmarks.measure import WrongResult
from scripts.benchmarks.peers import Mount
from scripts.benchmarks.results import WRITE, Cell, Results
from scripts.benchmarks.steps import Bench, Step

MIB = 2**20
UNPROBED = 65 * MIB
"""Half way between two of the 64 places where measure.drop_cached looks in a file of 128 MiB."""
CELLS = [
    Cell("sftp", 20.0, "plain TCP", "sequential", 8.8),
    Cell("sftp", 20.0, "hpcfs", "sequential", 9.0, peak_memory=100 * MIB, cpu_seconds=4.25),
    Cell("sftp", 20.0, "sshfs", "sequential", 100.0, peak_memory=8 * MIB, cpu_seconds=3.5),
    Cell("sftp", 20.0, "rclone", "sequential", 20.0, peak_memory=90 * MIB, cpu_seconds=9.0),
    Cell("sftp", 20.0, "hpcfs", "copy", 3.0, peak_memory=200 * MIB, cpu_seconds=1.0),
    Cell("sftp", 20.0, "sshfs", "copy", 24.0, cpu_seconds=0.5),
    Cell("sftp", 20.0, "rclone", "copy", None, "> 300 s", timed_out=True),
    Cell("sftp", 20.0, "hpcfs", "random", 4.2),
    Cell("sftp", 20.0, "rclone", "random", None, "what was read is not what is there"),
    Cell("sftp", 20.0, "plain TCP", "write", 8.8, kind="write"),
    Cell("sftp", 20.0, "hpcfs", "write", 9.0, kind="write", ended=9.0, peak_memory=50 * MIB),
    Cell("sftp", 20.0, "sshfs", "write", 45.0, kind="write", ended=45.0),
    Cell("sftp", 20.0, "hpcfs", "copy-in", 20.0, kind="write", ended=20.0),
    Cell("sftp", 20.0, "hpcfs-back", "copy-in", 2.0, kind="write", ended=0.5, cpu_seconds=1.5),
    Cell("sftp", 20.0, "sshfs", "copy-in", 50.0, kind="write", ended=50.0),
]


@pytest.fixture
def measured() -> Results:
    return Results(
        size=1024 * MIB,
        rate_mbits=1000.0,
        timeout=300.0,
        machine="2 cores",
        date="2026-01-02",
        versions={"hpcfs": "0.1.0", "sshfs": "3.7.3", "rclone": "1.75.2"},
        missing=["s3fs: not installed"],
        cells=list(CELLS),
    )


def test_the_text_has_seconds_ratios_and_goals(measured: Results) -> None:
    assert report.text(measured) == EXPECTED


EXPECTED = """\
2026-01-02, 2 cores, link of 1000 Mbit/s
  hpcfs: 0.1.0
  sshfs: 3.7.3
  rclone: 1.75.2
  s3fs: not installed

sftp, 20 ms: reads, in seconds
                                hpcfs  sshfs   rclone  best peer / hpcfs
1 GiB, one after another        9.000  100.0     20.0               2.22
(one plain TCP stream: 8.80 s)
200 random reads of 4 KiB       4.200          failed
copy out 500 small files        3.000   24.0  > 300 s               8.00
peak memory, MiB                  200      8       90
CPU seconds                       5.2    4.0      9.0

sftp, 20 ms: writes, in seconds until the remote had all (until the program had ended)
                                hpcfs     hpcfs-back  sshfs  best peer / hpcfs  / hpcfs-back
write 1 GiB                     9.000                  45.0               5.00
(one plain TCP stream: 8.80 s)
copy in 500 small files          20.0  2.000 (0.500)   50.0               2.50         25.00
peak memory, MiB                   50              0      0
CPU seconds                       0.0            1.5    0.0

failed
  sftp 20 ms, rclone, random: what was read is not what is there

goals
sequential           sftp 20 ms  at least 95% of one plain TCP stream      98%      reached
sequential           sftp 20 ms             at least 2x the best peer    2.22x      reached
random               sftp 20 ms      at most 1.1x one round trip each    1.05x      reached
copy                 sftp 20 ms                    at least 10x sshfs    8.00x  NOT reached
copy                 sftp 20 ms             at least 3x the best peer    8.00x      reached
write                sftp 20 ms  at least 90% of one plain TCP stream      98%      reached
write                sftp 20 ms          no slower than the best peer    5.00x      reached
copy-in              sftp 20 ms                     at least 2x sshfs    2.50x      reached
copy-in, hpcfs-back  sftp 20 ms                    at least 20x sshfs   25.00x      reached
all                  everywhere             at most 300 MiB of memory  200 MiB      reached"""


def test_json_brings_everything_back(measured: Results, tmp_path: Path) -> None:
    measured.write(tmp_path / "results.json")
    assert results.read(tmp_path / "results.json") == measured


def test_repeats_count_with_their_median(measured: Results) -> None:
    measured.cells += [replace(CELLS[1], seconds=seconds) for seconds in (30.0, 10.0)]
    assert measured.seconds("sftp", 20.0, "hpcfs", "sequential") == 10.0


def test_a_peer_that_was_too_slow_counts_with_the_limit(measured: Results) -> None:
    assert goals.best_peer(measured, "sftp", 20.0, "copy", "rclone") == 300.0
    assert goals.best_peer(measured, "sftp", 20.0, "random") is None


def test_our_own_failure_reaches_no_goal(measured: Results) -> None:
    measured.cells = [replace(one, seconds=None) if one.contender == "hpcfs" else one
                      for one in measured.cells]  # fmt: skip
    by_workload = {one.workload: one for one in goals.outcomes(measured)}
    assert not by_workload["sequential"].reached
    assert by_workload["sequential"].seen == "failed"


def test_the_chart_is_xml_and_names_what_it_shows(measured: Results) -> None:
    picture = chart.svg(measured)
    texts = [one.text for one in xml.etree.ElementTree.fromstring(picture).iter() if one.text]
    assert "1 GiB, one after another" in texts
    assert {"hpcfs", "sshfs", "rclone", "> 300"} <= set(texts)


def test_the_chart_of_writes_has_both_modes_and_no_reads(measured: Results) -> None:
    picture = chart.svg(measured, WRITE)
    texts = [one.text for one in xml.etree.ElementTree.fromstring(picture).iter() if one.text]
    assert {"write 1 GiB", "copy in 500 small files", "hpcfs-back"} <= set(texts)
    assert "1 GiB, one after another" not in texts


# --- writing --------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """The steps' view of a mount that is a local directory: what serves it is up to the test."""
    files = Files(tmp_path / "served", MIB, tmp_path / "repository")
    (files.root / "small" / "inner").mkdir(parents=True)
    (files.root / "small" / "a").write_bytes(b"first")
    (files.root / "small" / "inner" / "b").write_bytes(b"second")
    (tmp_path / "mount").mkdir()
    mount = cast(Mount, SimpleNamespace(files=tmp_path / "mount"))
    programs = measure.Programs(time.monotonic() + 20, lambda: None)
    return Bench(files, mount, programs, tmp_path, "sftp", "new")


@contextmanager
def bringing(bench: Bench, tamper: Callable[[Path], None] = lambda _: None) -> Iterator[None]:
    """A remote that gets what was written late, all at once, perhaps not as it was."""

    def bring() -> None:
        source = bench.mount.files / bench.new
        while not ended.wait(0.01):
            if list(bench.mount.files.rglob("b")) or source.is_file():
                break
        ended.wait(LATE_SECONDS)
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, bench.served)
        tamper(bench.served)

    ended = threading.Event()
    thread = threading.Thread(target=bring)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


LATE_SECONDS = 0.7


@pytest.mark.slow
@pytest.mark.parametrize("step", [writes.copy_in, writes.rsync_in, writes.write])
def test_a_write_counts_until_the_remote_has_it(bench: Bench, step: Step) -> None:
    with bringing(bench):
        took = step(bench)
    assert took.ended is not None
    assert took.ended + LATE_SECONDS / 2 < took.seconds


@pytest.mark.slow
def test_a_write_counts_to_the_arrival_not_to_when_it_was_seen(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "LOOK_SECONDS", 3.0)
    with bringing(bench):
        assert writes.copy_in(bench).seconds < 2.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "file", "content"),
    [
        (writes.copy_in, "inner/b", b"SECOND"),
        (writes.append, ".", b"x" * writes.APPENDS * writer.APPEND_BYTES),
    ],
)
def test_other_bytes_on_the_server_are_a_failure(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, step: Step, file: str, content: bytes
) -> None:
    monkeypatch.setattr(writes, "PATIENCE_SECONDS", 0.5)

    def tamper(served: Path) -> None:
        (served / file).write_bytes(content)

    with bringing(bench, tamper), pytest.raises(WrongResult, match="not what was written"):
        step(bench)


@pytest.mark.slow
@pytest.mark.parametrize("leave", ["missing", "temporary"])
def test_what_never_arrives_takes_too_long(bench: Bench, leave: str) -> None:
    bench.programs.deadline = time.monotonic() + 2

    def tamper(served: Path) -> None:
        if leave == "missing":
            (served / "a").unlink()
        else:
            (served / "inner" / ".b.part").touch()

    with bringing(bench, tamper), pytest.raises(measure.TimedOut):
        writes.copy_in(bench)


@pytest.mark.slow
def test_times_that_rsync_brought_are_compared(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writes, "PATIENCE_SECONDS", 0.5)
    with (
        bringing(bench, lambda served: os.utime(served / "a", (1, 1))),
        pytest.raises(WrongResult, match="a has another time"),
    ):
        writes.rsync_in(bench)


@pytest.mark.slow
def test_a_clone_is_compared_with_one_made_here(bench: Bench) -> None:
    bench.files.make_repository()
    bench.mount.files.rmdir()
    bench.mount.files.symlink_to(bench.files.root)
    took = writes.git_clone(bench)
    assert took.ended is not None
    assert took.seconds == pytest.approx(took.ended, abs=0.1)
    assert (bench.served / ".git" / "HEAD").is_file()


def test_no_two_pieces_of_what_is_written_are_the_same() -> None:
    pieces = [bytes(piece) for piece in writer.pieces(100 * 1000 + 7, 1000)]
    assert len(pieces) == len(set(pieces)) == 101
    assert sum(map(len, pieces)) == 100 * 1000 + 7


def test_hpcfs_back_has_no_part_where_mount_has_no_such_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (back,) = (one for one in peers.CONTENDERS if one.name == "hpcfs-back")
    assert back.kinds == (WRITE,)
    monkeypatch.setattr(peers, "_help_of_hpcfs_mount", lambda: "--foreground")
    assert back.why_not() == "not available: this hpcfs mount has no --write"
    monkeypatch.setattr(peers, "_help_of_hpcfs_mount", lambda: "--foreground --write [back]")
    assert back.why_not() == ""


@pytest.mark.slow
def test_plain_tcp_carries_both_ways() -> None:
    with servers._tcp_peer() as port:
        assert servers.plain_tcp_seconds(port, 3 * MIB + 1, 20) > 0
        assert servers.plain_tcp_seconds(port, 3 * MIB + 1, 20, upload=True) > 0


# --- what measuring stands on ---------------------------------------------------------------------


def test_what_is_dropped_is_not_cached_any_more(tmp_path: Path) -> None:
    """On a disk; what is in memory (tmpfs) has no other place. Looked at where drop_cached itself
    did not look: since Linux 6 a look that must not wait begins to read."""
    file = Path.cwd() / f".bench-test-{os.getpid()}"
    try:
        file.write_bytes(os.urandom(128 * MIB))
        measure.drop_cached(file, tmp_path, [])
        with file.open("rb") as opened, pytest.raises(BlockingIOError):
            os.preadv(opened.fileno(), [bytearray(1)], UNPROBED, os.RWF_NOWAIT)
    finally:
        file.unlink()


@pytest.mark.slow
def test_usage_follows_processes_by_their_mark() -> None:
    """Also one whose parent has disowned it, as sshfs does with its ssh."""
    usage = measure.Usage("of-a-test")
    script = "sleep 600 & echo $!"
    environment = {**os.environ, measure.MARK: "of-a-test"}
    command = ["sh", "-c", f"({script}) </dev/null 2>/dev/null"]
    told = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert told.stdout is not None
    pid = int(told.stdout.readline())
    told.stdout.close()
    told.wait()
    try:
        assert usage.look() == [pid]
        assert usage.memory() > 0
    finally:
        measure.end(usage.look())
