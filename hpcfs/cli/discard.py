"""`hpcfs discard`: drops files that are not uploaded, once the user has seen them."""

from __future__ import annotations

import os

import click

from hpcfs.cli import cache_places, pending
from hpcfs.cli.output import size
from hpcfs.control import control
from hpcfs.control.control import ControlRequest, PendingList
from hpcfs.model.errors import SetupError
from hpcfs.system.text import printable

MAX_NAMED = 10


@click.command(short_help="Give up what is not uploaded.")
@click.argument("where", metavar="PATH")
@click.option("--yes", is_flag=True, help="Do not ask.")
def discard(where: str, yes: bool) -> int:
    """Forget what was written to PATH, a file or a directory, and is not uploaded. It is lost then,
    and the mount shows what the remote has. 'hpcfs recover' copies it before."""
    place = cache_places.find_mounted(where)
    assert place.socket
    found = pending.query(place)
    if not found.count:
        raise SetupError(f"nothing of {where} waits to be uploaded: 'hpcfs status' lists what does")
    if found.states.get("writing"):
        raise SetupError(f"a program still writes to {where}: end that first")
    if not yes and not _confirm(found):
        print("nothing was discarded")
        return 1
    # Data written while the user decides is kept.
    request = ControlRequest("discard", place.path, before=found.time)
    outcome = control.work(place.socket, request, lambda _: None)
    print(printable(f"{place.name}: discarded {pending.amount(outcome.files, outcome.bytes)}"))
    return 0


def _confirm(found: PendingList) -> bool:
    """Ask the user. Raises SetupError where there is nobody to ask."""
    lost = pending.amount(found.count, found.size)
    if not (os.isatty(0) and os.isatty(1)):
        raise SetupError(f"{lost} would be lost, the remote does not have them: say so with --yes")
    for file in found.files[:MAX_NAMED]:
        reason = f": {file.reason}" if file.reason else ""
        about = f"{size(file.size)}, {file.state}{reason}"
        print(printable(f"  {file.namespace}/{file.path} ({about})"))
    if found.count > MAX_NAMED:
        print(f"  and {found.count - MAX_NAMED} more")
    return click.confirm(f"Lose {lost} that the remote does not have?", default=False)
