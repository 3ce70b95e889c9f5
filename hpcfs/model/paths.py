"""Path algebra: the only place where paths are taken apart and put together.

A path is bytes, relative to some root, with "/" between its names and none at either end; b"" is
the root itself. Nothing here knows of "." and "..", nor of any file system.
"""

from __future__ import annotations


def join(directory: bytes, name: bytes) -> bytes:
    """Return the path of `name`, which may be a longer path or b"", in `directory`."""
    return directory + b"/" + name if directory and name else directory or name


def parent(path: bytes) -> bytes:
    """Return the path of the directory that holds `path`; of the root, the root."""
    return path.rpartition(b"/")[0]


def name(path: bytes) -> bytes:
    """Return the last name of `path`; of the root, b""."""
    return path.rpartition(b"/")[2]


def split(path: bytes) -> tuple[bytes, bytes]:
    """Return (parent, name)."""
    directory, _, last = path.rpartition(b"/")
    return directory, last


def beside(path: bytes, name: bytes) -> bytes:
    """Return the path of `name` in the directory that holds `path`."""
    directory, slash, _ = path.rpartition(b"/")
    return directory + slash + name


def names(path: bytes) -> list[bytes]:
    """Return the names of `path` from the root on; of the root, none."""
    return path.split(b"/") if path else []


def is_below(path: bytes, top: bytes) -> bool:
    """Return whether `path` is `top` or in the tree under it."""
    return not top or path == top or path.startswith(top + b"/")
