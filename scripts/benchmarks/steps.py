"""The context that all steps get, and the times that they return."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.files import Files
from scripts.benchmarks.measure import Programs
from scripts.benchmarks.peers import Mount
from scripts.benchmarks.reader import Reading
from scripts.benchmarks.writer import Writing


@dataclass(frozen=True)
class Took:
    """The time of a step, in seconds."""

    seconds: float
    ended: float | None = None
    """For writes the seconds until the program was told that all is well. The remote may have the
    data later."""


@dataclass(frozen=True)
class Bench:
    """The context of a step."""

    files: Files
    mount: Mount
    programs: Programs
    scratch: Path
    """A directory in memory, if there is one."""
    remote: str
    new: str
    """A name in the mount's top directory that nobody had before, for steps that write."""

    def at(self, name: str) -> str:
        return str(self.mount.files / name)

    @property
    def served(self) -> Path:
        """The written files, where the server has them."""
        return self.files.root / self.new

    def read(self, *commands: list[str]) -> tuple[float, list[Reading]]:
        """Run several readers at once; return the seconds from the first one's start to the last
        one's end."""
        reader = [sys.executable, "-P", "-m", "scripts.benchmarks.reader"]
        told = self.programs.together([[*reader, *command] for command in commands])
        readings = [Reading(**json.loads(line)) for line in told]
        started = min(reading.started for reading in readings)
        return max(reading.ended for reading in readings) - started, readings

    def write(self, *command: str) -> Writing:
        writer = [sys.executable, "-P", "-m", "scripts.benchmarks.writer"]
        (told,) = self.programs.together([[*writer, *command]])
        return Writing(**json.loads(told))


Step = Callable[[Bench], Took]
