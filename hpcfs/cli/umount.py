"""`hpcfs umount`: unmounts, and returns once the daemon has ended, its uploads done."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click

from hpcfs.cli.output import complain, printable
from hpcfs.control import control, mountpoint
from hpcfs.errors import SetupError
from hpcfs.system import mountinfo, paths

PATIENCE_SECONDS = 2.0
"""After this the user is told what is waited for."""
MAX_USERS_NAMED = 5


@click.command(short_help="Unmount, after pending uploads.")
@click.argument("place", metavar="MOUNTPOINT")
def umount(place: str) -> None:
    """Unmount, and wait until the daemon has uploaded what is pending and has ended."""
    target = paths.absolute_mountpoint(place)
    _check_mounted(target)
    try:
        daemon: socket.socket | None = control.open_wait(paths.find_socket(target))
    except SetupError:  # gone, hung, or its socket was removed: unmounting helps in each case
        daemon = None
    if daemon is None and mountpoint.is_dead(target):
        mountpoint.unmount(target, lazy=True)
        complain(f"the daemon of {target} was gone; what it left behind is unmounted")
        return
    try:
        mountpoint.unmount(target)
    except mountpoint.Busy:
        raise SetupError(_busy(target)) from None
    if daemon is not None:
        with daemon:
            _wait(daemon, target)


def _check_mounted(target: Path) -> None:
    found = mountinfo.at(target, mountinfo.read())
    if found is None:
        raise SetupError(f"nothing is mounted at {target}: 'hpcfs status' lists what is")
    if found.kind != mountinfo.HPCFS_TYPE:
        raise SetupError(f"what is mounted at {target} is not hpcfs's ({found.kind})")


def _wait(daemon: socket.socket, target: Path) -> None:
    """For as long as uploads take: Ctrl-C ends the waiting, not the uploads."""
    if control.wait_until_gone(daemon, PATIENCE_SECONDS):
        return
    complain(f"{target} is unmounted; waiting for its daemon to finish (Ctrl-C stops only waiting)")
    control.wait_until_gone(daemon, None)


def _busy(target: Path) -> str:
    users = list(dict.fromkeys(users_below(target)))
    if not users:
        return f"{target} is in use by programs that can't be seen: close its files and try again"
    named = ", ".join(users[:MAX_USERS_NAMED])
    more = f" and {len(users) - MAX_USERS_NAMED} more" if len(users) > MAX_USERS_NAMED else ""
    return f"{target} is in use by {named}{more}: end them or leave the directory, then try again"


def users_below(target: Path) -> Iterator[str]:
    """Processes with a working directory, root or open file there. Reads the links of /proc only:
    nothing below a mount that may hang is looked at."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and any(_is_below(link, target) for link in _links(process)):
            yield f"{_name(process)} (pid {process.name})"


def _links(process: Path) -> Iterator[str]:
    names = ["cwd", "root"]
    with suppress(OSError):  # it ended, or is another user's
        names += [f"fd/{number}" for number in os.listdir(process / "fd")]
    with suppress(OSError):
        names += [f"map_files/{area}" for area in os.listdir(process / "map_files")]
    for name in names:
        with suppress(OSError):
            yield os.readlink(process / name)


def _is_below(link: str, target: Path) -> bool:
    return link == str(target) or link.startswith(f"{target}/")


def _name(process: Path) -> str:
    try:
        return printable((process / "comm").read_text(errors="replace").strip())
    except OSError:  # it ended meanwhile
        return "a program"
