"""The tables that a run prints: seconds and ratios for each remote and delay, and the goals."""

from __future__ import annotations

from scripts.benchmarks import goals
from scripts.benchmarks.results import HPCFS, TCP, Cell, Results
from scripts.benchmarks.workloads import titles

MIB = 2**20


def text(results: Results) -> str:
    parts = [_heading(results)]
    for remote in results.remotes:
        for rtt in results.delays:
            parts.append(_table(results, remote, rtt))
    parts += [_failures(results), _goals(results)]
    return "\n\n".join(part for part in parts if part)


def _heading(results: Results) -> str:
    lines = [f"{results.date}, {results.machine}, link of {results.rate_mbits:g} Mbit/s"]
    lines += [f"  {name}: {version}" for name, version in results.versions.items()]
    lines += [f"  {name}: not installed" for name in results.missing]
    return "\n".join(lines)


def _table(results: Results, remote: str, rtt: float) -> str:
    columns = results.contenders(remote)
    rows = [["", *columns, "best peer / hpcfs"]]
    for name, title in titles(results.size).items():
        cells = [_cell(results, remote, rtt, contender, name) for contender in columns]
        if any(cells):
            rows.append([title, *cells, _ratio(results, remote, rtt, name)])
        if reference := results.seconds(remote, rtt, TCP, name):
            note = f"(one plain TCP stream: {reference:.2f} s)"
            rows.append([note, *[""] * (len(columns) + 1)])
    rows.append(["peak memory, MiB", *[_memory(results, remote, rtt, one) for one in columns], ""])
    rows.append(["CPU seconds", *[_cpu(results, remote, rtt, one) for one in columns], ""])
    return f"{remote}, {rtt:g} ms (seconds)\n{_aligned(rows)}"


def _ratio(results: Results, remote: str, rtt: float, workload: str) -> str:
    ours = results.seconds(remote, rtt, HPCFS, workload)
    best = goals.best_peer(results, remote, rtt, workload)
    return f"{best / ours:.2f}" if ours and best else ""


def _cell(results: Results, remote: str, rtt: float, contender: str, workload: str) -> str:
    seconds = results.seconds(remote, rtt, contender, workload)
    if seconds is not None:
        return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"
    found = results.of(remote, rtt, contender, workload)
    if not found:
        return ""
    return found[0].failure if found[0].timed_out else "failed"


def _memory(results: Results, remote: str, rtt: float, contender: str) -> str:
    peak = max((cell.peak_memory for cell in _cells(results, remote, rtt, contender)), default=0)
    return f"{peak / MIB:.0f}"


def _cpu(results: Results, remote: str, rtt: float, contender: str) -> str:
    return f"{sum(cell.cpu_seconds for cell in _cells(results, remote, rtt, contender)):.1f}"


def _cells(results: Results, remote: str, rtt: float, contender: str) -> list[Cell]:
    wanted = (remote, rtt, contender)
    return [one for one in results.cells if (one.remote, one.rtt_ms, one.contender) == wanted]


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
