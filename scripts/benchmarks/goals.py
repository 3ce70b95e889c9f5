"""The goals of hpcfs as ratios within one run, and whether a run reached them.

A peer that timed out counts with the time limit: it needed at least that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from scripts.benchmarks.reads import PIECES
from scripts.benchmarks.results import HPCFS, HPCFS_BACK, TCP, Results

MEMORY_MIB = 300
MIB = 2**20
BEST, SSHFS, S3FS, TRIPS = "the best peer", "sshfs", "s3fs", "one round trip each"


@dataclass(frozen=True)
class Goal:
    """A goal: to be `times` as fast as `against`. Below one it says how much slower is still
    good."""

    workload: str
    rtt_ms: float
    remote: str
    times: float
    against: str
    ours: str = HPCFS

    @property
    def wish(self) -> str:
        if self.against == TCP:
            return f"at least {self.times:.0%} of one {TCP} stream"
        if self.times < 1:
            return f"at most {1 / self.times:.1f}x {self.against}"
        if self.times == 1:
            return f"no slower than {self.against}"
        return f"at least {self.times:g}x {self.against}"

    def shown(self, ratio: float) -> str:
        if self.against == TCP:
            return f"{ratio:.0%}"
        return f"{1 / ratio:.2f}x" if self.times < 1 else f"{ratio:.2f}x"


def _both(workload: str, rtt_ms: float, times: float, against: str) -> list[Goal]:
    return [Goal(workload, rtt_ms, remote, times, against) for remote in ("sftp", "s3")]


GOALS = [
    *_both("sequential", 20, 0.95, TCP),
    Goal("sequential", 20, "sftp", 2, BEST),
    *_both("sequential", 100, 0.85, TCP),
    *_both("sequential", 0, 1.5, BEST),
    *[goal for rtt in (0, 20, 100) for goal in _both("cached", rtt, 2, BEST)],
    *[goal for rtt in (0, 20, 100) for goal in _both("first", rtt, 1 / 1.2, BEST)],
    *_both("random", 20, 1 / 1.1, TRIPS),
    Goal("copy", 20, "sftp", 10, SSHFS),
    *_both("copy", 20, 3, BEST),
    Goal("copy", 0, "sftp", 1, SSHFS),
    Goal("walk", 0, "sftp", 1, SSHFS),
    Goal("walk", 20, "sftp", 5, SSHFS),
    Goal("walk", 20, "s3", 10, S3FS),
    *_both("write", 20, 0.9, TCP),
    *_both("write", 20, 1, BEST),
    *_both("write", 0, 1.2, BEST),
    Goal("copy-in", 20, "sftp", 2, SSHFS),
    Goal("copy-in", 20, "sftp", 20, SSHFS, HPCFS_BACK),
    Goal("rsync-in", 20, "sftp", 3, SSHFS),
    Goal("rsync-in", 20, "sftp", 20, SSHFS, HPCFS_BACK),
    *_both("append", 20, 2, BEST),
    Goal("git-clone", 20, "sftp", 5, SSHFS, HPCFS_BACK),
    Goal("sequential", 20, "tunnel", 0.8, TCP),
    Goal("sequential", 0, "tunnel", 1.5, SSHFS),
]


@dataclass(frozen=True)
class Outcome:
    """What became of one goal, as the report shows it."""

    goal: str
    place: str
    workload: str
    seen: str
    reached: bool


def outcomes(results: Results) -> Iterator[Outcome]:
    """Yield the outcomes of the goals for which the run has the measurements."""
    for goal in GOALS:
        place = f"{goal.remote} {goal.rtt_ms:g} ms"
        name = goal.workload if goal.ours == HPCFS else f"{goal.workload}, {goal.ours}"
        ours = results.seconds(goal.remote, goal.rtt_ms, goal.ours, goal.workload)
        theirs = _seconds_of(results, goal)
        if ours is not None and theirs is not None:
            ratio = theirs / ours
            reached = (
                ratio >= goal.times * 0.9995
            )  # a ratio that is printed like the goal counts as reached
            yield Outcome(goal.wish, place, name, goal.shown(ratio), reached)
        elif cells := results.of(goal.remote, goal.rtt_ms, goal.ours, goal.workload):
            late = f"> {results.timeout:g} s" if cells[0].timed_out else "failed"
            seen = late if ours is None else "nothing to compare with"
            yield Outcome(goal.wish, place, name, seen, reached=False)
    peak = max((one.peak_memory for one in results.cells if is_ours(one.contender)), default=0)
    if peak:
        wish = f"at most {MEMORY_MIB} MiB of memory"
        seen = f"{peak / MIB:.0f} MiB"
        yield Outcome(wish, "everywhere", "all", seen, peak <= MEMORY_MIB * MIB)


def is_ours(contender: str) -> bool:
    return contender in (HPCFS, HPCFS_BACK)


def _seconds_of(results: Results, goal: Goal) -> float | None:
    if goal.against == TRIPS:
        return PIECES * goal.rtt_ms / 1000
    if goal.against == TCP:
        return results.seconds(goal.remote, goal.rtt_ms, TCP, goal.workload)
    program = "" if goal.against == BEST else goal.against
    return best_peer(results, goal.remote, goal.rtt_ms, goal.workload, program)


def best_peer(
    results: Results, remote: str, rtt_ms: float, workload: str, program: str = ""
) -> float | None:
    """Return the shortest time of all peers, or of one program with any options."""
    times = []
    for contender in dict.fromkeys(cell.contender for cell in results.cells):
        if contender == TCP or is_ours(contender) or not contender.startswith(program):
            continue
        seconds = results.seconds(remote, rtt_ms, contender, workload)
        if seconds is not None:
            times.append(seconds)
        elif any(one.timed_out for one in results.of(remote, rtt_ms, contender, workload)):
            times.append(results.timeout)
    return min(times, default=None)
