"""Which programs create every name that they look up in vain. No I/O, no clock.

A name that a listing of a moment ago lacks may have been created by others since, so a lookup asks
the remote. But cp, tar and rsync look up each name that they are about to create, and the remote is
asked then: it creates only what is new. Once a program has done so many times in a row, and nothing
else, the listing will do for it. FUSE does not tell what a name is looked up for.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from hpcfs.inodes.tree import Node

RUN = 128
"""Names created in a row."""
MOST_WANTED = 4
"""Names that were looked up and are still to be created: rsync's temporary one and the last one."""
_MOST_PROCESSES = 100
UNKNOWN_PROCESS = 0
"""The kernel's id for a process of another PID namespace."""

Name = tuple[Node, bytes]
"""(directory, name)"""


@dataclass(slots=True)
class _Process:
    run: int = 0
    wanted: list[Name] = field(default_factory=list)


class CreatePredictor:
    """Counts, for each process, the names that it looked up in vain and then created.

    Processes go by their ids (of threads, as the kernel tells them).
    """

    def __init__(self) -> None:
        self._processes: OrderedDict[int, _Process] = OrderedDict()

    def is_creating(self, process: int) -> bool:
        """Whether the process will create the next name that it looks up in vain."""
        found = self._processes.get(process)
        return found is not None and found.run >= RUN

    def missed(self, process: int, name: Name) -> None:
        """Note that the process was told that there is no such name."""
        if process == UNKNOWN_PROCESS:
            return
        found = self._of(process)
        if name in found.wanted:
            return
        found.wanted.append(name)
        if len(found.wanted) > MOST_WANTED:
            found.wanted.pop(0)
            found.run = 0

    def created(self, process: int, name: Name) -> None:
        """Note that the process created this name."""
        found = self._processes.get(process)
        if found is not None and name in found.wanted:
            found.wanted.remove(name)
            found.run += 1

    def does_else(self, process: int) -> None:
        """Note that the process opened, removed or found what it had not created, or read a
        directory."""
        self._processes.pop(process, None)

    def _of(self, process: int) -> _Process:
        found = self._processes.setdefault(process, _Process())
        self._processes.move_to_end(process)
        if len(self._processes) > _MOST_PROCESSES:
            self._processes.popitem(last=False)
        return found
