"""`hpcfs cache`: shows, clears and verifies caches, and fetches and pins files.

A mounted cache belongs to its daemon, which does the work on request over the control socket. A
cache that is not mounted is opened here, with the same lock. Exit code 1: something was damaged, or
something could not be done; the rest was done.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from hpcfs.cli import cache_places, warming
from hpcfs.cli.cache_places import CacheTarget
from hpcfs.cli.mount import cache_dir_option
from hpcfs.cli.output import complain, count, json_line, size
from hpcfs.cli.progress import ProgressBar
from hpcfs.control import control
from hpcfs.control.control import CacheFolder, CacheStatus, ControlRequest, Outcome
from hpcfs.model.errors import SetupError
from hpcfs.system.text import printable

FULL_OF_PINS = 0.8
"""The part of the cache that pins may take before the user is warned."""


@click.group(invoke_without_command=True, short_help="Show, fill, clear and verify caches.")
@click.pass_context
def cache(ctx: click.Context) -> int:
    """Show what the caches of all your mounts hold, mounted now or not; or see the commands."""
    if ctx.invoked_subcommand is None:
        return show_all(None, None, as_json=False)
    return 0


@cache.command(short_help="Show what caches hold.")
@click.argument("place", metavar="[MOUNTPOINT]", required=False)
@cache_dir_option
@click.option("--json", "as_json", is_flag=True, help="A JSON list, for scripts.")
def show(place: str | None, cache_dir: Path | None, as_json: bool) -> int:
    """Show all caches, or that of one mount point."""
    return show_all(place, cache_dir, as_json=as_json)


@cache.command(short_help="Empty caches.")
@click.argument("place", metavar="[PATH|MOUNTPOINT]", required=False)
@cache_dir_option
@click.option("--pinned", is_flag=True, help="Also what is pinned.")
def clear(place: str | None, cache_dir: Path | None, pinned: bool) -> int:
    """Drop what is cached: of all mounts, of one, or of a path in one.

    What is not uploaded yet, what could not be uploaded, and what is pinned stays.
    """
    return _on_each(place, cache_dir, ControlRequest("clear", pinned=pinned), _report_cleared)


@cache.command(short_help="Look for damage in caches.")
@click.argument("place", metavar="[MOUNTPOINT]", required=False)
@cache_dir_option
def verify(place: str | None, cache_dir: Path | None) -> int:
    """Compare all that is cached with its checksums. What is damaged is dropped, to be fetched anew
    when it is read; the exit code is then 1."""
    return _on_each(place, cache_dir, ControlRequest("verify"), _report_verified)


@cache.command(short_help="Fetch files and directories into the cache.")
@click.argument("where", metavar="PATH...", nargs=-1, required=True)
@click.option("--pin", "wants_pin", is_flag=True, help="And pin them: they stay in the cache.")
def warm(where: tuple[str, ...], wants_pin: bool) -> int:
    """Fetch what is missing of these, directories with all below them. Ctrl-C stops it; what was
    fetched by then stays."""
    places = [cache_places.find_mounted(text) for text in where]
    if wants_pin:
        for place in places:
            _ask(place, ControlRequest("pin", place.path))
    found = warming.warm(places)
    print(printable(f"{size(found.bytes)} of {count(found.files, 'file')} are in the cache"))
    if wants_pin:
        _warn_of_pins(places)
    return 1 if found.problems else 0


@cache.command(short_help="Keep files and directories in the cache.")
@click.argument("where", metavar="PATH...", nargs=-1, required=True)
def pin(where: tuple[str, ...]) -> None:
    """What is cached of these, now and later, is never evicted. It is fetched when it is read, or
    at once with 'hpcfs cache warm --pin'."""
    places = [cache_places.find_mounted(text) for text in where]
    for place in places:
        _ask(place, ControlRequest("pin", place.path))
    _warn_of_pins(places)


@cache.command(short_help="Let the cache evict them again.")
@click.argument("where", metavar="PATH...", nargs=-1, required=True)
def unpin(where: tuple[str, ...]) -> None:
    """Undo pin, also for what was pinned below a directory."""
    for text in where:
        place = cache_places.find_mounted(text)
        try:
            _ask(place, ControlRequest("unpin", place.path))
        except control.DaemonRefused as refused:
            raise SetupError(f"{text}: {refused}") from None


def _ask(place: CacheTarget, request: ControlRequest) -> Outcome:
    assert place.socket
    return control.work(place.socket, request, lambda _: None)


# --- one or all ---------------------------------------------------------------------------------


def _on_each(
    text: str | None,
    cache_dir: Path | None,
    request: ControlRequest,
    report: Callable[[CacheTarget, Outcome], int],
) -> int:
    """Run the request on one cache or all; one that fails does not stop the others. Returns the
    highest exit code."""
    if text is not None:
        return report(*_do(cache_places.find(text, cache_dir), request))
    places = cache_places.find_all(cache_dir)
    if not places:
        complain("there is no cache")
    codes = [0]
    for place in places:
        try:
            codes.append(report(*_do(place, request)))
        except SetupError as error:
            complain(f"{place.name}: {error}")
            codes.append(1)
    return max(codes)


def _do(place: CacheTarget, request: ControlRequest) -> tuple[CacheTarget, Outcome]:
    request = msgspec.structs.replace(request, path=place.path)
    with ProgressBar(printable(place.name)) as bar:
        if place.socket is not None:
            return place, control.work(place.socket, request, bar.show)
        outcome = cache_places.answer(place, request, bar.show).outcome
    assert outcome
    return place, outcome


def _report_cleared(place: CacheTarget, outcome: Outcome) -> int:
    print(printable(f"{place.name}: cleared {size(outcome.bytes)}"))
    return 0


def _report_verified(place: CacheTarget, outcome: Outcome) -> int:
    looked = f"{place.name}: {size(outcome.bytes)} in {count(outcome.files, 'file')}"
    if not outcome.damaged_files:
        print(printable(f"{looked}: all as it was stored"))
        return 0
    damaged = f"{size(outcome.damaged_bytes)} in {count(outcome.damaged_files, 'file')}"
    print(printable(f"{looked}: {damaged} did not match and were dropped"))
    return 1


def _warn_of_pins(places: list[CacheTarget]) -> None:
    """Warn of pins that leave so little room that the cache is useless for all else."""
    for socket in {place.socket for place in places if place.socket}:
        found = control.query_cache(socket)
        pinned = sum(folder.pinned_bytes for folder in found.folders)
        if found.limit and pinned > FULL_OF_PINS * found.limit:
            complain(
                f"what is pinned takes {size(pinned)} of the cache's {size(found.limit)}: "
                "unpin some of it, or raise cache_size"
            )


# --- show ---------------------------------------------------------------------------------------


def show_all(text: str | None, cache_dir: Path | None, *, as_json: bool) -> int:
    """Print the status of one cache or all; return the exit code."""
    places = [cache_places.find(text, cache_dir)] if text else cache_places.find_all(cache_dir)
    found: list[CacheStatus] = []
    code = 0
    for place in places:
        try:
            found.append(_query(place))
        except SetupError as error:
            complain(f"{place.name}: {error}")
            code = 1
    if as_json:
        print(json_line(found))
    elif found:
        print("\n\n".join(_describe(one) for one in found))
    elif not places:
        print("there is no cache")
    return code


def _query(place: CacheTarget) -> CacheStatus:
    if place.socket is not None:
        return control.query_cache(place.socket)
    status = cache_places.answer(place, ControlRequest("cache"), lambda _: None).cache
    assert status
    return status


def _describe(found: CacheStatus) -> str:
    where = found.mountpoint or "of a mount that nobody remembers"
    head = where if found.mounted else f"{where}  (not mounted)"
    limit = f" of {size(found.limit)}" if found.limit is not None else ""
    floor = f", {size(found.min_free)} stay free" if found.min_free else ""
    width = max((len(folder.name or folder.origin) for folder in found.folders), default=0)
    lines = [
        head,
        *(_folder_line(folder, width) for folder in found.folders),
        f"  used: {size(found.used)}{limit} in {found.directory}",
        f"  disk: {size(found.free)} free{floor}",
    ]
    lines += [f"  pinned: {one}" for one in found.pins]
    return "\n".join(printable(line) for line in lines)


def _folder_line(folder: CacheFolder, width: int) -> str:
    pinned = f", {size(folder.pinned_bytes)} pinned" if folder.pinned_files else ""
    name = folder.name or folder.origin
    return f"  {name:<{width}}  {size(folder.bytes)} in {count(folder.files, 'file')}{pinned}"
