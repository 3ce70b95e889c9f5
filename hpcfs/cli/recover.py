"""`hpcfs recover`: copies files that are not uploaded to a local directory, mounted or not.

They stay pending. Exit code 1: something could not be copied, or only a part of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from hpcfs.cli import cache_places, pending
from hpcfs.cli.cache_places import CacheTarget
from hpcfs.cli.mount import cache_dir_option
from hpcfs.cli.output import complain
from hpcfs.cli.progress import ProgressBar
from hpcfs.control import control, mountpoint
from hpcfs.control.control import ControlRequest, Outcome
from hpcfs.model.errors import SetupError
from hpcfs.system.text import printable


@click.command(short_help="Copy out what is not uploaded.")
@click.argument("where", metavar="[PATH]", required=False)
@click.option("--to", "to", metavar="DIR", required=True, help="A local directory for the copies.")
@cache_dir_option
def recover(where: str | None, to: str, cache_dir: Path | None) -> int:
    """Copy the local versions of what is not uploaded to DIR/NAMESPACE/PATH: of PATH, or of all of
    your mounts, also of those that are not mounted now. No file is overwritten; what is copied
    stays pending."""
    target = _target(to)
    if where:
        places = [cache_places.find_below(where, cache_dir)]
    else:
        places = cache_places.find_all(cache_dir)
    found, code = Outcome(), 0
    for place in places:
        try:
            done, partial = _recover(place, target)
        except SetupError as error:
            complain(f"{place.name}: {error}")
            code = 1
            continue
        found = Outcome(found.files + done.files, found.bytes + done.bytes)
        for path in partial:
            complain(f"{path} has only what was changed: 'hpcfs mount', and recover the whole file")
            code = 1
    if found.files:
        copied = pending.amount(found.files, found.bytes)
        print(printable(f"copied {copied} to {target}; still pending: 'hpcfs discard' ends that"))
    elif code == 0:
        print("nothing is waiting to be uploaded")
    return code


def _target(text: str) -> Path:
    """Return the directory for the copies. Raises SetupError where a copy would itself wait to be
    uploaded."""
    target = Path(os.path.realpath(os.path.expanduser(text)))
    for found in mountpoint.mounts():
        if target.is_relative_to(found.mountpoint):
            raise SetupError(f"{target} is in the mount {found.mountpoint}: name a local directory")
    return target


def _recover(place: CacheTarget, target: Path) -> tuple[Outcome, list[Path]]:
    with ProgressBar("copying") as bar:
        if place.socket is not None:
            pending.query(place)
            request = ControlRequest("recover", place.path, to=os.fsencode(target))
            return control.work(place.socket, request, bar.show), []
        # It imports trio, which mounted ones don't need.
        from hpcfs.daemon import write_commands

        assert place.directory
        return write_commands.recover_unmounted(
            place.directory, place.path, os.fsencode(target), bar.show
        )
