"""`hpcfs status`: what is mounted, which namespaces work, and what could not be uploaded.

Exit code 0: what was asked for is mounted and its daemon answers (without MOUNTPOINT: there is a
mount and all answer). 1: not so. A namespace that failed does not change the code: the mount works.
"""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec

from hpcfs.cli.output import ago, complain, count, printable, size
from hpcfs.control import control, mountpoint
from hpcfs.control.control import KeptFile, MountStatus, NamespaceStatus
from hpcfs.errors import SetupError
from hpcfs.system import paths


class Silent(msgspec.Struct, frozen=True):
    """A mount whose daemon gave no status, as --json shows it."""

    mountpoint: str
    error: str


@click.command(short_help="Show mounts and their namespaces.")
@click.argument("place", metavar="[MOUNTPOINT]", required=False)
@click.option("--json", "as_json", is_flag=True, help="A JSON list, for scripts.")
def status(place: str | None, as_json: bool) -> int:
    """Show all of your mounts, or one. The exit code is 0 if all that is shown answers."""
    targets = _own_mounts()
    if place is not None:
        wanted = paths.absolute_mountpoint(place)
        targets = [target for target in targets if target == wanted]
    found = [_query(target) for target in targets]
    if as_json:
        print(msgspec.json.encode(found).decode())
    elif not found:
        where = f" at {paths.absolute_mountpoint(place)}" if place else ""
        complain(f"no hpcfs mount{where}")
    else:
        print("\n\n".join(_describe(one) for one in found))
    is_fine = bool(found) and all(isinstance(one, MountStatus) for one in found)
    return 0 if is_fine else 1


def _own_mounts() -> list[Path]:
    """Root, who may unmount all, sees all."""
    own = os.getuid()
    return [found.mountpoint for found in mountpoint.mounts() if own in (0, found.user_id)]


def _query(target: Path) -> MountStatus | Silent:
    try:
        return control.query_status(paths.find_socket(target))
    except SetupError as error:
        return Silent(str(target), _why_silent(target, error))


def _why_silent(target: Path, error: SetupError) -> str:
    if mountpoint.is_dead(target):
        return f"its daemon is gone: 'hpcfs umount {target}' tidies up"
    return str(error)


def _describe(found: MountStatus | Silent) -> str:
    if isinstance(found, Silent):
        return printable(f"{found.mountpoint}: {found.error}")
    head = (
        f"{found.mountpoint}  (pid {found.pid}, hpcfs {found.version}, "
        f"mounted {ago(found.started)} ago)"
    )
    files = f"{count(found.open_files, 'open file')}, {found.dirty_files} not yet uploaded"
    cache = f"{size(found.cache_used)} of {size(found.cache_size)} in {found.cache_dir}"
    lines = [head, *_namespace_lines(found.namespaces)]
    lines += [f"  files: {files}", f"  cache: {cache}"]
    if found.memory:
        lines.append(f"  memory: {size(found.memory)}")
    lines += [f"  log: {found.log_file}", *_kept_lines(found.kept)]
    return "\n".join(printable(line) for line in lines)


def _namespace_lines(namespaces: list[NamespaceStatus]) -> list[str]:
    width = max((len(found.name) for found in namespaces), default=0)
    return [_namespace_line(found, width) for found in namespaces]


def _namespace_line(found: NamespaceStatus, width: int) -> str:
    mode = ", read-only" if found.read_only else ""
    reason = f": {found.reason}" if found.reason else ""
    return f"  {found.name:<{width}}  {found.url}  {found.state}{mode}{reason}"


def _kept_lines(kept: list[KeptFile]) -> list[str]:
    if not kept:
        return []
    lines = [f"  {count(len(kept), 'file')} could not be uploaded; the bytes are kept here:"]
    for one in kept:
        lines.append(
            f"    {one.namespace}/{one.path} ({size(one.size)}, {ago(one.since)} ago): {one.reason}"
        )
        lines.append(f"      {one.data}")
    return lines
