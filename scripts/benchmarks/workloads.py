"""The workloads: each works on a fresh mount, then checks the result.

Steps that belong together share a mount: reading again needs what was read before. Mounting,
starting Python and checking are not part of the measured time.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks import reads, writes
from scripts.benchmarks.peers import Contender
from scripts.benchmarks.results import READ, WRITE
from scripts.benchmarks.steps import Step

SCRATCH_BYTES = 2**28


@dataclass(frozen=True)
class Workload:
    """Steps that share one mount; each is a row of the results."""

    steps: dict[str, Step]
    kind: str = READ
    makes_directories: bool = False

    def is_for(self, contender: Contender) -> bool:
        able = contender.makes_directories or not self.makes_directories
        return able and self.kind in contender.kinds


WORKLOADS = (
    Workload({"first": reads.first_bytes}),
    Workload({"sequential": reads.sequential, "cached": reads.cached}),
    Workload({"random": reads.random_pieces}),
    Workload({"copy": reads.copy_small}),
    Workload({"walk": reads.walk, "rewalk": reads.walk}),
    Workload({"two-readers": reads.two_readers}),
    Workload({"eight-readers": reads.eight_readers}),
    Workload({"write": writes.write}, WRITE),
    Workload({"copy-in": writes.copy_in}, WRITE, makes_directories=True),
    Workload({"rsync-in": writes.rsync_in}, WRITE, makes_directories=True),
    Workload({"append": writes.append}, WRITE),
    Workload({"git-clone": writes.git_clone}, WRITE, makes_directories=True),
)
NAMES = [name for workload in WORKLOADS for name in workload.steps]
KINDS = {
    f"{kind}s": [name for one in WORKLOADS if one.kind == kind for name in one.steps]
    for kind in (READ, WRITE)
}


def titles(size: int) -> dict[str, str]:
    """Return titles for tables by the step's name, in their order."""
    amount = f"{size / 2**30:g} GiB" if size >= 2**30 else f"{size / 2**20:g} MiB"
    small = f"{size / 2**24:g} MiB"
    return {
        "first": f"first 64 KiB of {amount}",
        "sequential": f"{amount}, one after another",
        "cached": f"{amount} again, from the cache",
        "random": f"{reads.PIECES} random reads of 4 KiB",
        "copy": "copy out 500 small files",
        "walk": "walk 5,000 entries",
        "rewalk": "walk them again",
        "two-readers": f"two readers on one file of {amount}",
        "eight-readers": f"eight readers, {small} each",
        "write": f"write {amount}",
        "copy-in": "copy in 500 small files",
        "rsync-in": "rsync 500 small files",
        "append": f"append {writes.APPENDS:,} times 4 KiB",
        "git-clone": "git clone of 1,000 files",
    }


def scratch_directory(otherwise: Path) -> Path:
    """Return a directory in memory where there is room: the local disk must not influence the
    results."""
    shared = Path("/dev/shm")
    roomy = os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > SCRATCH_BYTES
    return shared if roomy else otherwise
