"""A directory in which somebody left Python modules for whoever runs hpcfs there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_MODULES = (
    *("hpcfs/__init__.py", "hpcfs/cli/main.py", "hpcfs/worker/main.py", "sitecustomize.py"),
    *("asyncio.py", "asyncssh.py", "botocore.py", "click.py", "msgspec.py", "pyfuse3.py", "re.py"),
    *("runpy.py", "socket.py", "trio.py", "uvloop.py"),
)
_CODE = """
import os
with open({marks!r}, "a") as marks:
    marks.write(f"{{__file__}} in pid {{os.getpid()}}\\n")
"""


@dataclass(frozen=True)
class Planted:
    directory: Path
    _marks: Path

    @property
    def executed(self) -> str:
        """What ran of it, and in which processes."""
        return self._marks.read_text() if self._marks.exists() else ""


def plant(directory: Path) -> Planted:
    marks = directory.with_name(f"{directory.name}-executed")
    for name in _MODULES:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_CODE.format(marks=str(marks)))
    return Planted(directory, marks)


SEARCH_PATHS = ("", ":", ".", ":/nonexistent", "/nonexistent:", "../planted")
"""Values of PYTHONPATH, none of which names a directory of Python modules; each but the first means
the current one, if that is named "planted"."""
