"""`hpcfs login`: has a mount log in again, with this terminal to answer its questions.

Exit code 0: all that was to be logged in is. 1: otherwise.
"""

from __future__ import annotations

import click

from hpcfs.cli import cache_places, terminal
from hpcfs.cli.cache_places import CacheTarget
from hpcfs.cli.output import complain
from hpcfs.control import control
from hpcfs.model.errors import SetupError
from hpcfs.system import paths
from hpcfs.system.text import printable


@click.command(short_help="Log in where a login was refused.")
@click.argument("args", nargs=-1, metavar="[MOUNTPOINT] [NAME]")
def login(args: tuple[str, ...]) -> int:
    """Log in to the namespaces that need it, or to NAME, in one mount or in all of yours.

    Asks here for a password, a passphrase, a second factor or a host key. Keys and credentials are
    read anew, so that those you have changed count. The exit code is 0 if nothing is left to do.
    """
    if len(args) > 2:
        raise click.UsageError("one mount point and one namespace at most")
    places, name = _recognise(args)
    if not places:
        raise SetupError("no hpcfs mount")
    found = False
    code = 0
    with terminal.restored():
        for place in places:
            try:
                names = _to_log_in(place, name)
            except SetupError as error:
                complain(f"{place.name}: {error}")
                code = 1
                continue
            for one in names:
                found = True
                code = max(code, _log_in(place, one))
    if not found and name is not None and not code:
        raise SetupError(f"no namespace is named {name}: 'hpcfs status' shows which there are")
    if not found and not code:
        print("nothing needs a login")
    return code


def _recognise(args: tuple[str, ...]) -> tuple[list[CacheTarget], str | None]:
    """Return the mounts and the name that the arguments mean; a single one is a mount point if
    there is one, else a name."""
    mounted = cache_places.find_all_mounted()
    if not args:
        return mounted, None
    at_it = [one for one in mounted if one.mountpoint == paths.absolute_mountpoint(args[0])]
    if len(args) == 1 and not at_it and "/" not in args[0]:
        return mounted, args[0]
    return at_it or [cache_places.find_mounted(args[0])], args[1] if len(args) == 2 else None


def _to_log_in(place: CacheTarget, name: str | None) -> list[str]:
    """Return the namespaces. Raises SetupError where the daemon does not answer."""
    assert place.socket
    status = control.query_status(place.socket)
    if name is None:
        return [one.name for one in status.namespaces if one.needs_login]
    return [one.name for one in status.namespaces if one.name == name]


def _log_in(place: CacheTarget, name: str) -> int:
    """Log one namespace in and tell how it went; return the exit code."""
    assert place.socket
    assert place.mountpoint
    shown = place.mountpoint / name
    try:
        control.log_in(place.socket, name, terminal.ask)
    except SetupError as error:
        complain(f"{shown}: {error}")
        return 1
    print(printable(f"{shown}: logged in"))
    return 0
