"""The results of a run: plain values, to and from JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

TCP = "plain TCP"
HPCFS = "hpcfs"
HPCFS_BACK = "hpcfs-back"
"""hpcfs with write = "back" in its configuration."""
READ, WRITE = "read", "write"


@dataclass(frozen=True)
class Cell:
    """One measurement. Without `seconds`, `failure` says why."""

    remote: str
    rtt_ms: float
    contender: str
    workload: str
    seconds: float | None
    failure: str = ""
    peak_memory: int = 0
    cpu_seconds: float = 0.0
    timed_out: bool = False
    kind: str = READ
    """The workload's kind, READ or WRITE."""
    ended: float | None = None
    """For writes the seconds until the program had ended; `seconds` is until the remote had all."""


@dataclass
class Results:
    """All measurements of one run, with what they were made on. `size` is in bytes."""

    size: int
    rate_mbits: float
    timeout: float
    machine: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    """The versions of the contenders that took part."""
    missing: list[str] = field(default_factory=list)
    """Contenders that could not take part, each with the reason."""
    cells: list[Cell] = field(default_factory=list)

    def of(self, remote: str, rtt_ms: float, contender: str, workload: str) -> list[Cell]:
        wanted = (remote, rtt_ms, contender, workload)
        return [
            cell
            for cell in self.cells
            if (cell.remote, cell.rtt_ms, cell.contender, cell.workload) == wanted
        ]

    def seconds(self, remote: str, rtt_ms: float, contender: str, workload: str) -> float | None:
        """Return the median of the repeats that succeeded."""
        return _median(cell.seconds for cell in self.of(remote, rtt_ms, contender, workload))

    def ended(self, remote: str, rtt_ms: float, contender: str, workload: str) -> float | None:
        return _median(cell.ended for cell in self.of(remote, rtt_ms, contender, workload))

    @property
    def remotes(self) -> list[str]:
        return _in_order(cell.remote for cell in self.cells if cell.contender != TCP)

    @property
    def delays(self) -> list[float]:
        return sorted({cell.rtt_ms for cell in self.cells})

    def contenders(self, remote: str, kind: str) -> list[str]:
        """Return the contenders, without the reference."""
        cells = (cell for cell in self.cells if (cell.remote, cell.kind) == (remote, kind))
        found = (cell.contender for cell in cells)
        return [name for name in _in_order(found) if name != TCP]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(path: Path) -> Results:
    values = json.loads(path.read_text())
    values["cells"] = [Cell(**cell) for cell in values["cells"]]
    return Results(**values)


def _median(found: Iterable[float | None]) -> float | None:
    times = [seconds for seconds in found if seconds is not None]
    return statistics.median(times) if times else None


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
