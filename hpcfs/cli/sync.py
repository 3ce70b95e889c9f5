"""`hpcfs sync`: waits until the remotes have everything, or everything below one path.

Exit code 1: something could not be uploaded. 3: --timeout passed before that. Ctrl-C ends the
waiting, not the uploads.
"""

from __future__ import annotations

from contextlib import suppress

import click

from hpcfs.cli import cache_places, pending, waiting
from hpcfs.cli.cache_places import CacheTarget
from hpcfs.cli.output import complain
from hpcfs.cli.progress import ProgressBar
from hpcfs.cli.waiting import timeout_option
from hpcfs.control import control
from hpcfs.control.control import WorkProgress
from hpcfs.model.errors import SetupError
from hpcfs.system.text import printable


@click.command(short_help="Wait until all is uploaded.")
@click.argument("where", metavar="[PATH]", required=False)
@timeout_option
def sync(where: str | None, timeout: float | None) -> int:
    """Wait until the remotes have all that was written: below PATH, or in all of your mounts."""
    places = [cache_places.find_mounted(where)] if where else cache_places.find_all_mounted()
    if not places:
        raise SetupError("no hpcfs mount")
    end = waiting.ends_at(timeout)
    return max([_sync(place, end) for place in places])


def _sync(place: CacheTarget, end: float | None) -> int:
    assert place.socket
    notice = waiting.OutageNotice()
    try:
        pending.query(place)
        with ProgressBar("uploading") as bar:

            def show(step: WorkProgress) -> None:
                bar.show(step)
                notice.show(step)

            request = waiting.sync_request(end, place.path)
            outcome = control.work(place.socket, request, show, waiting.left(end))
    except KeyboardInterrupt:
        _report_rest(place)
        raise
    except control.OutOfTime:
        _report_rest(place)
        return waiting.OUT_OF_TIME
    except SetupError as error:
        complain(f"{place.name}: {error}")
        return 1
    done = "nothing was pending"
    if outcome.files:
        done = f"uploaded {pending.amount(outcome.files, outcome.bytes)}"
    print(printable(f"{place.name}: {done}"))
    return 0


def _report_rest(place: CacheTarget) -> None:
    with suppress(SetupError):  # the user wants to stop, and needs no reason
        found = pending.query(place, control.ANSWER_SECONDS)
        left = pending.amount(found.count, found.left)
        complain(f"{place.name}: {left} still to be uploaded; the mount goes on with that")
