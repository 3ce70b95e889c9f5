"""Checks this machine: Python, FUSE, the mount point, the cache."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from hpcfs.cache import location
from hpcfs.cli.findings import Finding
from hpcfs.cli.output import size
from hpcfs.config.config import Config
from hpcfs.control import mountpoint
from hpcfs.model.errors import SetupError
from hpcfs.system import paths

MIN_PYTHON = (3, 11)


def machine() -> Iterator[Finding]:
    """Check Python, /dev/fuse, fusermount3 and the directories of logs and sockets."""
    version = platform.python_version()
    if sys.version_info >= MIN_PYTHON:
        yield Finding("ok", "python", version)
    else:
        yield Finding("fail", "python", f"{version} is too old: install Python 3.11 or later")
    yield _passes("/dev/fuse", mountpoint.check_device, "can be opened")
    helper = shutil.which("fusermount3")
    yield _passes("fusermount3", mountpoint.check_helper, helper or "missing; root needs none")
    yield _passes("directories", _check_directories, f"logs are in {paths.state_dir()}")


def mount_place(config: Config) -> Iterator[Finding]:
    """Check the configured mount point."""
    if config.mountpoint is None:
        yield Finding("ok", "mountpoint", "none configured: name one at each mount")
        return
    place = paths.absolute_mountpoint(config.mountpoint)
    if any(found.mountpoint == place for found in mountpoint.mounts()):
        if mountpoint.is_dead(place):
            text = f"{place} was left behind by a dead daemon: the next mount, or umount, tidies up"
            yield Finding("warn", "mountpoint", text)
            return
        yield Finding("ok", "mountpoint", f"hpcfs is mounted at {place}; 'hpcfs status' tells more")
        return
    yield _passes("mountpoint", lambda: mountpoint.check_directory(place), str(place))


def cache(config: Config) -> Iterator[Finding]:
    """Check the cache's directory and its free space."""
    try:
        where = location.locate(config.cache_dir)
        location.check(where.directory)
    except SetupError as error:
        yield Finding("fail", "cache", str(error))
        return
    if where.note:
        yield Finding("warn", "cache", where.note)
    yield _free_space(where.directory, config.cache_size)


def _free_space(directory: Path, cache_size: int) -> Finding:
    existing = next(place for place in (directory, *directory.parents) if place.exists())
    found = os.statvfs(existing)
    free = found.f_bavail * found.f_frsize
    if free < cache_size:
        return Finding(
            "warn",
            "cache",
            f"{directory} has {size(free)} free, less than cache_size ({size(cache_size)}): "
            "set a smaller cache_size, or cache_dir to a larger disk",
        )
    return Finding("ok", "cache", f"{directory}, {size(free)} free")


def _check_directories() -> None:
    paths.make_private(paths.state_dir())
    paths.make_private(paths.runtime_dirs()[0])


def _passes(subject: str, check: Callable[[], None], text: str) -> Finding:
    try:
        check()
    except SetupError as error:
        return Finding("fail", subject, str(error))
    return Finding("ok", subject, text)
