"""Lists the host aliases in ~/.ssh/config.

ssh itself interprets the file for a host (remotes/ssh/options.py). This module reads only `Host`
lines, to tell an alias from an rclone remote and to offer hosts in `hpcfs init`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from hpcfs.model import ssh_syntax
from hpcfs.system import paths

MAX_INCLUDE_DEPTH = 16
"""The limit of OpenSSH itself."""


def default_file() -> Path:
    """Return the path of the user's SSH configuration."""
    return paths.home() / ".ssh" / "config"


def aliases(file: Path | None = None) -> list[str]:
    """Return the names in `Host` lines without wildcards, in order; none if the file can't be read.
    Names that ssh would refuse as a host are omitted."""
    found = dict.fromkeys(_aliases(file or default_file(), MAX_INCLUDE_DEPTH))
    return [
        name
        for name in found
        if not any(mark in name for mark in "*?!") and ssh_syntax.is_valid_host(name)
    ]


def _aliases(file: Path, depth: int) -> Iterator[str]:
    for keyword, arguments in _lines(file):
        if keyword == "host":
            yield from arguments
        elif keyword == "include" and depth > 0:
            for pattern in arguments:
                for included in sorted(glob.glob(_include_path(pattern))):
                    yield from _aliases(Path(included), depth - 1)


def _include_path(pattern: str) -> str:
    return os.path.join(default_file().parent, os.path.expanduser(pattern))


def _lines(file: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        text = file.read_text(errors="replace")
    except OSError:  # no such file: no aliases; connecting reports one that can't be read
        return
    for line in text.splitlines():
        try:
            words = ssh_syntax.split(line)
        except ssh_syntax.BadQuotes:  # ssh will report it; this only lists names
            continue
        if words:
            yield words[0], words[1:]
