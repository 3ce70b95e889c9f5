"""`hpcfs status`: shows mounts, their namespaces, and files that are not uploaded.

Exit code 0: the named mount is there and its daemon answers (without MOUNTPOINT: there is a mount,
and all answer). 1: otherwise. A failed namespace does not change the code: the mount works.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from hpcfs.cli import pending
from hpcfs.cli.output import ago, complain, count, json_line, size
from hpcfs.cli.pending import UnansweredMount
from hpcfs.control import control, mountpoint
from hpcfs.control.control import MountStatus, NamespaceStatus
from hpcfs.model.errors import SetupError
from hpcfs.system import paths
from hpcfs.system.text import printable

MAX_NOTICES = 10
"""The number of conflicts shown, the last ones; --json has more."""


@click.command(short_help="Show mounts and their namespaces.")
@click.argument("place", metavar="[MOUNTPOINT]", required=False)
@click.option("--json", "as_json", is_flag=True, help="A JSON list, for scripts.")
@click.option("--watch", "live", is_flag=True, help="Once a second, until q or Ctrl-C.")
def status(place: str | None, as_json: bool, live: bool) -> int:
    """Show all of your mounts, or one. The exit code is 0 if all that is shown answers."""
    query, show = partial(_find, place), partial(_show, place, as_json=as_json)
    if not live:
        return show(query())
    from hpcfs.cli import watch

    return watch.watch(query, show, draws=not as_json)


def _find(place: str | None) -> Sequence[MountStatus | UnansweredMount]:
    targets = _own_mounts()
    if place is not None:
        wanted = paths.absolute_mountpoint(place)
        targets = [target for target in targets if target == wanted]
    return [_query(target) for target in targets]


def _show(
    place: str | None, found: Sequence[MountStatus | UnansweredMount], *, as_json: bool
) -> int:
    """Print what was found; return the exit code."""
    if as_json:
        print(json_line(found))
    elif not found:
        where = f" at {paths.absolute_mountpoint(place)}" if place else ""
        complain(f"no hpcfs mount{where}")
    else:
        print("\n\n".join(_describe(one) for one in found))
    is_fine = bool(found) and all(isinstance(one, MountStatus) for one in found)
    return 0 if is_fine else 1


def _own_mounts() -> list[Path]:
    """Return this user's mounts; for root, who may unmount all, those of all users."""
    own = os.getuid()
    return [found.mountpoint for found in mountpoint.mounts() if own in (0, found.user_id)]


def _query(target: Path) -> MountStatus | UnansweredMount:
    try:
        return control.query_status(paths.find_socket(target))
    except SetupError as error:
        return UnansweredMount(str(target), _why_silent(target, error))


def _why_silent(target: Path, error: SetupError) -> str:
    if mountpoint.is_dead(target):
        return f"its daemon is gone: 'hpcfs umount {target}' tidies up"
    return str(error)


def _describe(found: MountStatus | UnansweredMount) -> str:
    if isinstance(found, UnansweredMount):
        return printable(f"{found.mountpoint}: {found.error}")
    head = (
        f"{found.mountpoint}  (pid {found.pid}, hpcfs {found.version}, "
        f"mounted {ago(found.started)} ago)"
    )
    cache = f"{size(found.cache_used)} of {size(found.cache_size)} in {found.cache_dir}"
    lines = [head, *_namespace_lines(found.namespaces)]
    lines += [f"  files: {count(found.open_files, 'open file')}", f"  cache: {cache}"]
    if found.memory:
        lines.append(f"  memory: {size(found.memory)}")
    lines += [f"  log: {found.log_file}", *pending.lines(found)]
    lines += [f"  conflict: {notice}" for notice in found.notices[-MAX_NOTICES:]]
    lines += [f"  trouble: {one}" for one in found.troubles[-MAX_NOTICES:]]
    return "\n".join(printable(line) for line in lines)


def _namespace_lines(namespaces: list[NamespaceStatus]) -> list[str]:
    width = max((len(found.name) for found in namespaces), default=0)
    return [_namespace_line(found, width) for found in namespaces]


def _namespace_line(found: NamespaceStatus, width: int) -> str:
    mode = ", read-only" if found.read_only else ", write back" if found.write == "back" else ""
    reason = f": {found.reason}" if found.reason else ""
    state = f"needs login ('hpcfs login {found.name}')" if found.needs_login else found.state
    return f"  {found.name:<{width}}  {found.url}  {state}{mode}{reason}"
