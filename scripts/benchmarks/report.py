"""The tables that a run prints: seconds and ratios for each remote and delay, and the goals. Reads
and writes have tables of their own, since other contenders take part."""

from __future__ import annotations

from scripts.benchmarks import goals
from scripts.benchmarks.results import HPCFS, HPCFS_BACK, READ, TCP, WRITE, Cell, Results
from scripts.benchmarks.workloads import titles

MIB = 2**20
UNITS = {
    READ: "reads, in seconds",
    WRITE: "writes, in seconds until the remote had all (until the program had ended)",
}
APART = 1.1
"""The ratio to the end of the program above which the later end is shown."""


def text(results: Results) -> str:
    parts = [_heading(results)]
    for remote in results.remotes:
        for rtt in results.delays:
            parts += [_table(results, remote, rtt, kind) for kind in (READ, WRITE)]
    parts += [_failures(results), _goals(results)]
    return "\n\n".join(part for part in parts if part)


def _heading(results: Results) -> str:
    lines = [f"{results.date}, {results.machine}, link of {results.rate_mbits:g} Mbit/s"]
    lines += [f"  {name}: {version}" for name, version in results.versions.items()]
    lines += [f"  {reason}" for reason in results.missing]
    return "\n".join(lines)


def _table(results: Results, remote: str, rtt: float, kind: str) -> str:
    found = results.contenders(remote, kind)
    ours = [one for one in (HPCFS, HPCFS_BACK) if one in found]
    columns = [*ours, *(one for one in found if one not in ours)]
    ratios = [f"/ {one}" for one in ours]
    if ours:
        ratios[0] = f"best peer {ratios[0]}"
    rows = [["", *columns, *ratios]]
    names = {one.workload for one in results.cells if one.kind == kind}
    for name, title in titles(results.size).items():
        if name not in names:
            continue
        cells = [_cell(results, remote, rtt, contender, name) for contender in columns]
        if any(cells):
            ratios = [_ratio(results, remote, rtt, one, name) for one in ours]
            rows.append([title, *cells, *ratios])
        if reference := results.seconds(remote, rtt, TCP, name):
            note = f"(one plain TCP stream: {reference:.2f} s)"
            rows.append([note, *[""] * (len(rows[0]) - 1)])
    if len(rows) == 1:
        return ""
    used = {one: _cells(results, remote, rtt, one, kind) for one in columns}
    empty = [""] * len(ours)
    rows.append(["peak memory, MiB", *[_memory(used[one]) for one in columns], *empty])
    rows.append(["CPU seconds", *[_cpu(used[one]) for one in columns], *empty])
    return f"{remote}, {rtt:g} ms: {UNITS[kind]}\n{_aligned(rows)}"


def _ratio(results: Results, remote: str, rtt: float, ours: str, workload: str) -> str:
    seconds = results.seconds(remote, rtt, ours, workload)
    best = goals.best_peer(results, remote, rtt, workload)
    return f"{best / seconds:.2f}" if seconds and best else ""


def _cell(results: Results, remote: str, rtt: float, contender: str, workload: str) -> str:
    seconds = results.seconds(remote, rtt, contender, workload)
    if seconds is not None:
        ended = results.ended(remote, rtt, contender, workload)
        told = f" ({_seconds(ended)})" if ended and seconds > ended * APART else ""
        return _seconds(seconds) + told
    found = results.of(remote, rtt, contender, workload)
    if not found:
        return ""
    return found[0].failure if found[0].timed_out else "failed"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _memory(cells: list[Cell]) -> str:
    return f"{max((cell.peak_memory for cell in cells), default=0) / MIB:.0f}"


def _cpu(cells: list[Cell]) -> str:
    return f"{sum(cell.cpu_seconds for cell in cells):.1f}"


def _cells(results: Results, remote: str, rtt: float, contender: str, kind: str) -> list[Cell]:
    wanted = (remote, rtt, contender, kind)
    return [
        one for one in results.cells if (one.remote, one.rtt_ms, one.contender, one.kind) == wanted
    ]


def _failures(results: Results) -> str:
    """Those that need an explanation: a time limit does not."""
    found = [one for one in results.cells if one.failure and not one.timed_out]
    where = [(f"{one.remote} {one.rtt_ms:g} ms", one.contender, one.workload) for one in found]
    lines = [f"  {', '.join(at)}: {one.failure}" for at, one in zip(where, found, strict=True)]
    return "\n".join(["failed", *lines]) if lines else ""


def _goals(results: Results) -> str:
    rows = [
        [one.workload, one.place, one.goal, one.seen, "reached" if one.reached else "NOT reached"]
        for one in goals.outcomes(results)
    ]
    return "goals\n" + _aligned(rows) if rows else ""


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    )
