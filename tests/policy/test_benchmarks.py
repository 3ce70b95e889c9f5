"""What the benchmark says of its measurements: tables, goals and the chart, from fixed values."""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.benchmarks import chart, goals, measure, report, results
from scripts.benchmarks.results import Cell, Results

MIB = 2**20
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
        missing=["s3fs"],
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

sftp, 20 ms (seconds)
                                hpcfs  sshfs   rclone  best peer / hpcfs
1 GiB, one after another        9.000  100.0     20.0               2.22
(one plain TCP stream: 8.80 s)
200 random reads of 4 KiB       4.200          failed
copy out 500 small files        3.000   24.0  > 300 s               8.00
peak memory, MiB                  200      8       90
CPU seconds                       5.2    4.0      9.0

failed
  sftp 20 ms, rclone, random: what was read is not what is there

goals
sequential  sftp 20 ms  at least 95% of one plain TCP stream      98%      reached
sequential  sftp 20 ms             at least 2x the best peer    2.22x      reached
random      sftp 20 ms      at most 1.1x one round trip each    1.05x      reached
copy        sftp 20 ms                    at least 10x sshfs    8.00x  NOT reached
copy        sftp 20 ms             at least 3x the best peer    8.00x      reached
all         everywhere             at most 300 MiB of memory  200 MiB      reached"""


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


def test_what_is_dropped_is_not_cached_any_more(tmp_path: Path) -> None:
    """On a disk; what is in memory (tmpfs) has no other place."""
    file = Path.cwd() / f".bench-test-{os.getpid()}"
    try:
        file.write_bytes(os.urandom(128 * MIB))
        measure.drop_cached(file, tmp_path, [])
        with file.open("rb") as opened, pytest.raises(BlockingIOError):
            os.preadv(opened.fileno(), [bytearray(1)], 64 * MIB, os.RWF_NOWAIT)
    finally:
        file.unlink()


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
