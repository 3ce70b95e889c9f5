"""Finds the cache that an argument means: that of a mount, or one that is not mounted."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpcfs.cache import location
from hpcfs.config import config
from hpcfs.control import control, mountpoint
from hpcfs.control.control import ControlReply, ControlRequest, WorkProgress
from hpcfs.model.errors import SetupError
from hpcfs.system import paths


@dataclass(frozen=True, slots=True)
class CacheTarget:
    """A cache, or a path in one. For a mounted cache `socket` is set, and `path` is the path in the
    mount; b"" means all of it. Otherwise `directory` is the cache's own."""

    name: str
    mountpoint: Path | None = None
    socket: Path | None = None
    path: bytes = b""
    directory: Path | None = None


def find(text: str, cache_dir: Path | None) -> CacheTarget:
    """Return the cache, or the part of it, that a path or a mount point means. Raises
    SetupError."""
    if (place := _in_a_mount(text)) is not None:
        return place
    target = paths.absolute_mountpoint(text)
    directory = _base(cache_dir) / paths.mount_id(target)
    if not (directory / "lock").is_file():
        raise SetupError(f"{text} is in no mount, and no mount point with a cache")
    return CacheTarget(str(target), directory=directory)


def find_mounted(text: str) -> CacheTarget:
    """Do as `find`, but raise SetupError where it is not mounted."""
    place = find(text, None)
    if place.socket is None:
        raise SetupError(f"{text} is not mounted now: 'hpcfs mount' first")
    return place


def find_below(text: str, cache_dir: Path | None) -> CacheTarget:
    """Do as `find`, but accept a path below a mount point that is not mounted now."""
    if (place := _in_a_mount(text)) is not None:
        return place
    path, base = paths.absolute_mountpoint(text), _base(cache_dir)
    for target in [path, *path.parents]:
        directory = base / paths.mount_id(target)
        if (directory / "lock").is_file():
            below = b"" if target == path else os.fsencode(path.relative_to(target))
            return CacheTarget(str(path), path=below, directory=directory)
    raise SetupError(f"{text} is in no mount, and below no mount point with a cache")


def find_all_mounted() -> list[CacheTarget]:
    """Return this user's mounts. Root may reach other users' mounts, but must name them."""
    own = os.getuid()
    targets = [found.mountpoint for found in mountpoint.mounts() if found.user_id == own]
    return [CacheTarget(str(target), target, paths.find_socket(target)) for target in targets]


def find_all(cache_dir: Path | None) -> list[CacheTarget]:
    """Return the caches of all of this user's mounts, then those that are not mounted."""
    places, in_use = find_all_mounted(), set()
    for place in places:
        assert place.socket
        try:
            in_use.add(Path(control.query_status(place.socket).cache_dir).resolve())
        except SetupError:  # reported when the cache itself is queried
            continue
    base = _base(cache_dir)
    found = sorted(base.iterdir()) if base.is_dir() else []
    for directory in found:
        if (directory / "lock").is_file() and directory.resolve() not in in_use:
            places.append(CacheTarget(str(directory), directory=directory))
    return places


def answer(
    place: CacheTarget, request: ControlRequest, on_step: Callable[[WorkProgress], None]
) -> ControlReply:
    """Execute a request on a cache that is not mounted. Raises SetupError."""
    from hpcfs.daemon import cache_commands  # imports trio, which mounted ones don't need

    assert place.directory
    return cache_commands.answer_unmounted(place.directory, request, on_step)


def _reachable_mounts() -> list[Path]:
    own = os.getuid()
    return [found.mountpoint for found in mountpoint.mounts() if own in (0, found.user_id)]


def _in_a_mount(text: str) -> CacheTarget | None:
    """Return the target in a mount, or None. Looks into the mount only if the path leads below
    it."""
    lexical = paths.absolute_mountpoint(text)
    mounts = _reachable_mounts()
    if lexical in mounts:
        return _place(lexical, lexical)
    path = Path(os.path.realpath(lexical))
    above = [target for target in mounts if path.is_relative_to(target)]
    return _place(max(above, key=lambda target: len(target.parts)), path) if above else None


def _place(target: Path, path: Path) -> CacheTarget:
    socket = paths.find_socket(target)
    below = b"" if path == target else os.fsencode(path.relative_to(target))
    return CacheTarget(str(path), target, socket, below)


def _base(cache_dir: Path | None) -> Path:
    """Return the directory that holds the caches of all mounts."""
    if cache_dir is None and paths.config_file().exists():
        file = paths.config_file()
        cache_dir = config.parse(config.read(file), file, needs_namespaces=False).cache_dir
    return location.locate(cache_dir).directory
