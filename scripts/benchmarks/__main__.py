"""`python -m scripts.benchmarks`: measures all requested combinations."""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hpcfs.system import mountinfo
from scripts.benchmarks import chart, measure, peers, report, results as outcome, workloads
from scripts.benchmarks.files import MIB, Files
from scripts.benchmarks.peers import Contender, Mount
from scripts.benchmarks.results import READ, TCP, WRITE, Cell, Results
from scripts.benchmarks.servers import Place, Servers, plain_tcp_seconds, serving
from scripts.benchmarks.steps import Bench, Step
from tests.support.s3 import BUCKET

REMOTES = ("sftp", "s3", "tunnel")
QUICK_SIZE = 64 * MIB
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


class Run:
    """All measurements of one run; each is printed on stderr when it is done."""

    def __init__(
        self, arguments: argparse.Namespace, directory: Path, files: Files, servers: Servers
    ) -> None:
        self._arguments = arguments
        self._directory = directory
        self._files = files
        self._scratch = workloads.scratch_directory(directory)
        self._numbers = itertools.count()
        self._servers = servers
        chosen = [one for one in peers.CONTENDERS if self._has_part(one)]
        why_not = {one.name: one.why_not() for one in chosen}
        self._contenders = [one for one in chosen if not why_not[one.name]]
        self.results = Results(
            size=files.size,
            rate_mbits=arguments.rate,
            timeout=arguments.timeout,
            machine=_machine(),
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            versions={one.name: one.version() for one in self._contenders},
            missing=[f"{name}: {reason}" for name, reason in why_not.items() if reason],
        )

    def _has_part(self, contender: Contender) -> bool:
        return (
            self._arguments.contenders(contender.name)
            and not {*contender.remotes}.isdisjoint(self._arguments.remotes)
            and any(one.is_for(contender) for one in self._workloads())
        )

    def _workloads(self) -> list[workloads.Workload]:
        wanted = self._arguments.workloads
        return [one for one in workloads.WORKLOADS if any(map(wanted, one.steps))]

    def run(self) -> None:
        for remote, rtt in itertools.product(self._arguments.remotes, self._arguments.delays):
            with self._servers.at(remote, rtt, self._arguments.rate) as place:
                for _ in range(self._arguments.repeat):
                    self._references(remote, rtt)
                    self._round(place, rtt)

    def _round(self, place: Place, rtt: float) -> None:
        for workload in self._workloads():
            for contender in self._contenders:
                if place.remote in contender.remotes and workload.is_for(contender):
                    self._measure(contender, workload, place, rtt)

    def _measure(
        self, contender: Contender, workload: workloads.Workload, place: Place, rtt: float
    ) -> None:
        """Run a workload's steps on a fresh mount. A failed step ends the workload, since later
        steps build on it."""
        steps = list(workload.steps.items())
        while not self._arguments.workloads(steps[-1][0]):
            steps.pop()
        top = self._directory / f"mount{next(self._numbers)}"
        blank = Cell(place.remote, rtt, contender.name, "", None, kind=workload.kind)
        failed: Cell | None = None
        try:
            with peers.mounted(contender, place, top) as mount:
                while steps and failed is None:
                    name, step = steps.pop(0)
                    cell = self._step(replace(blank, workload=name), step, mount)
                    self._note(cell)
                    failed = cell if cell.seconds is None else None
        except peers.MountFailed as error:
            failed = replace(blank, failure=f"not mounted: {error}")
        finally:
            self._servers.remove(place.remote, _new_name(top))
        if failed is not None:
            for name, _ in steps:
                self._note(replace(failed, workload=name))

    def _step(self, cell: Cell, step: Step, mount: Mount) -> Cell:
        timeout = self._arguments.timeout
        programs = measure.Programs(time.monotonic() + timeout, mount.kill)
        new = _new_name(mount.private.top)
        bench = Bench(self._files, mount, programs, self._scratch, cell.remote, new)
        sampler = measure.Sampler(mount.usage)
        took, failure, timed_out = None, "", False
        with sampler:
            try:
                took = step(bench)
            except measure.TimedOut:
                failure, timed_out = f"> {timeout:g} s", True
            except measure.WrongResult as error:
                failure = str(error)
        return replace(
            cell,
            seconds=took.seconds if took else None,
            ended=took.ended if took else None,
            failure=failure,
            timed_out=timed_out,
            peak_memory=sampler.peak_memory,
            cpu_seconds=round(sampler.cpu_seconds, 2),
        )

    def _references(self, remote: str, rtt: float) -> None:
        """Measure one plain TCP stream of the same size over a link of the same kind, each way."""
        for workload, kind in (("sequential", READ), ("write", WRITE)):
            if self._arguments.workloads(workload):
                with self._servers.at("tcp", rtt, self._arguments.rate) as place:
                    seconds = plain_tcp_seconds(
                        place.port,
                        self._files.size,
                        self._arguments.timeout,
                        upload=kind == WRITE,
                    )
                self._note(Cell(remote, rtt, TCP, workload, seconds, kind=kind))

    def _note(self, cell: Cell) -> None:
        if not self._arguments.workloads(cell.workload):
            return
        self.results.cells.append(cell)
        took = cell.failure if cell.seconds is None else f"{cell.seconds:.3f} s"
        ended = "" if cell.ended is None else f"   ended {cell.ended:.3f} s"
        place = f"{cell.remote} {cell.rtt_ms:g} ms"
        used = f"{cell.peak_memory / MIB:.0f} MiB, {cell.cpu_seconds:.2f} CPU s"
        _progress(f"{place:12} {cell.workload:13} {cell.contender:16} {took:>10}   {used}{ended}")


def _new_name(top: Path) -> str:
    """Return the name of what is written on the mount that has its directories there."""
    return f"new-{top.name}"


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, Linux {platform.release()}"


# --- arguments ------------------------------------------------------------------------------------


def _one_of(
    allowed: Iterable[str], groups: Mapping[str, list[str]] | None = None
) -> Callable[[str], Callable[[str], bool]]:
    """Return a parser for a list of names with commas, some of which stand for several. It returns
    a test of membership."""
    known = {name: [name] for name in sorted(allowed)} | dict(groups or {})

    def read(text: str) -> Callable[[str], bool]:
        names = []
        for name in map(str.strip, text.split(",")):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
            names += known[name]
        return names.__contains__

    return read


def _remotes(text: str) -> list[str]:
    chosen = _one_of(REMOTES)(text)
    return [remote for remote in REMOTES if chosen(remote)]


def _delays(text: str) -> list[float]:
    return [float(delay) for delay in text.split(",")]


def _size(text: str) -> int:
    number = text.rstrip("KMG")
    return int(float(number) * UNITS[text[len(number) :]])


def _everything(_: str) -> bool:
    return True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measures hpcfs and its peers on the same files, over an emulated link.",
    )
    add = parser.add_argument
    add("--remotes", type=_remotes, default=list(REMOTES), metavar="sftp,s3,tunnel")
    add("--delays", type=_delays, metavar="MS,...", help="round trips (0,20,100)")
    add("--rate", type=float, default=1000, metavar="MBITS", help="of the link (1000)")
    names = _one_of(workloads.NAMES, workloads.KINDS)
    listed = ", ".join((*workloads.KINDS, *workloads.NAMES))
    add("--workloads", type=names, default=_everything, metavar="NAME,...", help=listed)
    known = [one.name for one in peers.CONTENDERS]
    some, listed = _one_of(known), ", ".join(known)
    add("--contenders", type=some, default=_everything, metavar="NAME,...", help=listed)
    add("--size", type=_size, metavar="SIZE", help="of the big file (1G)")
    add("--repeat", type=int, default=1, metavar="N", help="the table has the median (1)")
    add("--timeout", type=float, metavar="SECONDS", help="of one measurement (300)")
    add("--quick", action="store_true", help="64 MiB, 0 and 20 ms, 60 s, unless told otherwise")
    add("--directory", type=Path, metavar="DIR", help="for files and caches ($TMPDIR)")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    add("--chart", type=Path, metavar="FILE", help="draw the reads there, as SVG")
    add("--chart-of-writes", type=Path, metavar="FILE", help="draw the writes there, as SVG")
    add("--from", type=Path, dest="earlier", metavar="FILE", help="only show earlier results")
    arguments = parser.parse_args()
    if arguments.delays is None:
        arguments.delays = [0.0, 20.0] if arguments.quick else [0.0, 20.0, 100.0]
    if arguments.size is None:
        arguments.size = QUICK_SIZE if arguments.quick else 1024 * MIB
    if arguments.timeout is None:
        arguments.timeout = 60.0 if arguments.quick else 300.0
    return arguments


# --- the run --------------------------------------------------------------------------------------


@contextmanager
def _temporary(parent: Path | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="hpcfs-bench-", dir=parent)).resolve()
    try:
        yield directory
    finally:
        if not any(one.mountpoint.is_relative_to(directory) for one in mountinfo.read()):
            shutil.rmtree(directory)


def _measure(arguments: argparse.Namespace) -> Results:
    """Measure everything. An interrupted run ends with the results so far."""
    with _temporary(arguments.directory) as directory:
        files = Files(directory / "buckets" / BUCKET, arguments.size, directory / "repository")
        _progress(f"making files in {directory}")
        files.make()
        with serving(directory, files.root, arguments.remotes) as servers:
            run = Run(arguments, directory, files, servers)
            for reason in run.results.missing:
                _progress(reason)
            try:
                run.run()
            except KeyboardInterrupt:
                _progress("interrupted: these are the results so far")
    return run.results


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    arguments = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    results = outcome.read(arguments.earlier) if arguments.earlier else _measure(arguments)
    print(report.text(results))
    if arguments.json:
        results.write(arguments.json)
    if arguments.chart:
        arguments.chart.write_text(chart.svg(results))
    if arguments.chart_of_writes:
        arguments.chart_of_writes.write_text(chart.svg(results, WRITE))


if __name__ == "__main__":
    main()
