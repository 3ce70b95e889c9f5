"""`hpcfs retry`: has the daemon retry uploads that failed."""

from __future__ import annotations

import click

from hpcfs.cli import cache_places, pending
from hpcfs.cli.output import complain
from hpcfs.control import control
from hpcfs.control.control import ControlRequest
from hpcfs.model.errors import SetupError
from hpcfs.system.text import printable


@click.command(short_help="Try again what could not be uploaded.")
@click.argument("where", metavar="[PATH]", required=False)
def retry(where: str | None) -> int:
    """Try again what failed or is kept: below PATH, or in all of your mounts. Returns at once;
    'hpcfs sync' waits for what comes of it."""
    places = [cache_places.find_mounted(where)] if where else cache_places.find_all_mounted()
    if not places:
        raise SetupError("no hpcfs mount")
    code = 0
    for place in places:
        assert place.socket
        try:
            pending.query(place)
            outcome = control.work(
                place.socket, ControlRequest("retry", place.path), lambda _: None
            )
        except SetupError as error:
            complain(f"{place.name}: {error}")
            code = 1
            continue
        done = "nothing had failed"
        if outcome.files:
            done = f"trying {pending.amount(outcome.files, outcome.bytes)} again"
        print(printable(f"{place.name}: {done}"))
    return code
