"""Which programs make every name that they ask for in vain. No I/O, no clock.

A name that a listing of a moment ago lacks may have been made by others since, so who asks for it
hears what the remote says. But cp, tar and rsync ask for each name that they are about to make, and
the remote is asked then: it makes only what is new. Once a program has done so many times in a row,
and nothing else, the listing will do for it. FUSE does not tell what a name is looked up for.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from hpcfs.inodes.tree import Node

RUN = 128
"""Names made in a row."""
MOST_WANTED = 4
"""Names that were asked for and are still to be made: rsync's temporary one and the last one."""
_MOST_PROCESSES = 100
UNKNOWN_PROCESS = 0
"""Of another PID namespace."""

Name = tuple[Node, bytes]
"""In a directory."""


@dataclass(slots=True)
class _Process:
    run: int = 0
    wanted: list[Name] = field(default_factory=list)


class Makers:
    """Processes go by their ids (of threads, as the kernel tells them)."""

    def __init__(self) -> None:
        self._processes: OrderedDict[int, _Process] = OrderedDict()

    def is_making(self, process: int) -> bool:
        found = self._processes.get(process)
        return found is not None and found.run >= RUN

    def missed(self, process: int, name: Name) -> None:
        """It was told that there is no such name."""
        if process == UNKNOWN_PROCESS:
            return
        found = self._of(process)
        if name in found.wanted:
            return
        found.wanted.append(name)
        if len(found.wanted) > MOST_WANTED:
            found.wanted.pop(0)
            found.run = 0

    def made(self, process: int, name: Name) -> None:
        found = self._processes.get(process)
        if found is not None and name in found.wanted:
            found.wanted.remove(name)
            found.run += 1

    def does_else(self, process: int) -> None:
        """It opened, removed or found what it had not made, or read a directory."""
        self._processes.pop(process, None)

    def _of(self, process: int) -> _Process:
        found = self._processes.setdefault(process, _Process())
        self._processes.move_to_end(process)
        if len(self._processes) > _MOST_PROCESSES:
            self._processes.popitem(last=False)
        return found
