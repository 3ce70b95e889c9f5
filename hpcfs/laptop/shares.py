"""Parses which folders of the laptop a tunnel shares, and how.

~/data            shared under its own name
code=~/src        shared under another name
~/data:ro         shared read-only
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcfs.model.errors import SetupError

_NAME = re.compile(r"[^/\x00-\x1f\x7f]+")
MAX_NAME_BYTES = 255
_NAMED = re.compile(r"([^/=:~$]+)=(.*)", re.DOTALL)
READ_ONLY_SUFFIX = ":ro"


@dataclass(frozen=True, slots=True)
class Share:
    """A shared folder; `directory` is absolute and without symlinks."""

    name: str
    directory: Path
    read_only: bool = False

    def __str__(self) -> str:
        return f"{self.directory} as {self.name}{' (read-only)' if self.read_only else ''}"


def collect(texts: Sequence[str], here: Path, home: Path) -> tuple[Share, ...]:
    """Return the shares that the user asked for; without any, the folder `here`. Raises
    SetupError."""
    if not texts:
        return (_only(here, home),)
    found: dict[str, Share] = {}
    for text in texts:
        share = parse(text, here, home)
        if share.name in found:
            raise SetupError(
                f"two shares are named {share.name}: give one another name, as in "
                f"--share other={share.directory}"
            )
        found[share.name] = share
    _check_nesting(tuple(found.values()))
    return tuple(found.values())


def _check_nesting(shares: Sequence[Share]) -> None:
    """Refuse a read-only folder inside a writable one: it could be changed under the other name."""
    for kept in shares:
        for share in shares:
            if kept.read_only and not share.read_only and _is_in(kept.directory, share.directory):
                raise SetupError(
                    f"{kept.name} is shared read-only, and could be changed through {share.name}, "
                    f"which it is in: share {share.directory} read-only too, or leave one out"
                )


def _is_in(inner: Path, outer: Path) -> bool:
    """Compare by inode numbers, since a file system may hold one directory under names that differ
    in case."""
    return any(os.path.samefile(place, outer) for place in (inner, *inner.parents))


def parse(text: str, here: Path, home: Path) -> Share:
    """Parse one --share argument. Raises SetupError for a folder that can't be shared."""
    path, read_only = text, text.endswith(READ_ONLY_SUFFIX)
    if read_only:
        path = text.removesuffix(READ_ONLY_SUFFIX)
    name = ""
    if (match := _NAMED.fullmatch(path)) and not os.path.exists(_expanded(path, here, home)):
        name, path = match[1], match[2]
    if not path:
        raise SetupError(f"--share {text} names no folder: the form is FOLDER, NAME=FOLDER")
    return _share(name, _expanded(path, here, home), read_only=read_only)


def _only(here: Path, home: Path) -> Share:
    """Share the folder `here`, unless it holds the home directory: that holds keys and passwords,
    so the user must name it."""
    if home.resolve().is_relative_to(here.resolve()):
        raise SetupError("say which folder to share, as in --share ~/data")
    return _share("", here, read_only=False)


def _expanded(path: str, here: Path, home: Path) -> Path:
    if path == "~" or path.startswith("~/"):
        return home / path[2:]
    return here / os.path.expandvars(path)


def _share(name: str, directory: Path, *, read_only: bool) -> Share:
    if not os.path.isdir(directory):  # Path's methods raise unexpected errors
        what = "is no folder" if os.path.exists(directory) else "does not exist"
        raise SetupError(f"{directory} can't be shared: it {what}")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise SetupError(f"{directory} can't be shared: you may not read it")
    resolved = directory.resolve()
    name = name or directory.name or resolved.name
    if not _is_valid(name):
        raise SetupError(f"{directory} needs a name to be shared: --share NAME={directory}")
    return Share(name, resolved, read_only)


def _is_valid(name: str) -> bool:
    """Return whether the name is valid, also for the rendezvous file, which is UTF-8."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return (
        _NAME.fullmatch(name) is not None and length <= MAX_NAME_BYTES and name not in (".", "..")
    )
