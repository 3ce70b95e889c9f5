"""`hpcfs status --watch`: the status, drawn once a second until Ctrl-C or q.

It draws on the terminal's alternate screen by itself: rich would take longer to import than a frame
may take. Lines are not measured: the terminal cuts those that are too long.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from hpcfs.cli import pending
from hpcfs.cli.output import ago, count, size
from hpcfs.cli.pending import UnansweredMount
from hpcfs.control.control import MountStatus, NamespaceStatus, PendingFile, SiteStatus
from hpcfs.system.text import printable

SECONDS = 1.0
_BAR = 10
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l"
"""The alternate screen, without a cursor, and without lines that wrap."""
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"

Found = Sequence[MountStatus | UnansweredMount]


def watch(query: Callable[[], Found], show: Callable[[Found], int], *, draws: bool) -> int:
    """Draw until the user quits, and return the exit code of the last query. Where there is no
    terminal, or with `draws` off, `show` prints each status."""
    code = 0
    try:
        if not draws or not sys.stdout.isatty():
            while True:
                code = show(query())
                sys.stdout.flush()
                time.sleep(SECONDS)
        rates = Rates()
        with _screen(), _keys() as has_keys:
            while True:
                found = query()
                code = 0 if found and all(isinstance(one, MountStatus) for one in found) else 1
                rates.note(found, time.monotonic())
                _draw(frame(found, rates, shutil.get_terminal_size().lines))
                if _quits(has_keys):
                    return code
    except KeyboardInterrupt:
        return code


class Rates:
    """The upload rate of each file in bytes per second, from one query to the next."""

    def __init__(self) -> None:
        self._left: dict[tuple[str, str], int] = {}
        self._at = 0.0
        self._rates: dict[tuple[str, str], float] = {}

    def note(self, found: Found, now: float) -> None:
        """Compare with the query before; `now` is in seconds."""
        seen = {
            (one.mountpoint, file.id): file.left
            for one in found
            if isinstance(one, MountStatus)
            for file in one.pending
        }
        passed = max(now - self._at, 0.01)
        self._rates = {
            key: max(0, self._left[key] - left) / passed
            for key, left in seen.items()
            if key in self._left
        }
        self._left, self._at = seen, now

    def of(self, status: MountStatus, file: PendingFile) -> float:
        """Return the file's rate; 0 where it is unknown."""
        return self._rates.get((status.mountpoint, file.id), 0.0)


# --- a frame ------------------------------------------------------------------------------------


def frame(found: Found, rates: Rates, height: int) -> list[str]:
    """Return at most `height` lines; queued files are omitted first."""
    head = f"hpcfs  {time.strftime('%H:%M:%S')}   q quits"
    if not found:
        return [head, "", "no hpcfs mount"]
    fixed = [_mount_lines(one) for one in found]
    room = height - 1 - sum(len(lines) + 1 for lines in fixed)
    shown = [head]
    for one, lines in zip(found, fixed, strict=True):
        files = _file_lines(one, rates, room) if isinstance(one, MountStatus) else []
        room -= len(files)
        shown += ["", *lines, *files]
    return shown[:height]


def _mount_lines(one: MountStatus | UnansweredMount) -> list[str]:
    if isinstance(one, UnansweredMount):
        return [click.style(printable(f"{one.mountpoint}: {one.error}"), fg="red")]
    head = printable(f"{one.mountpoint}  (mounted {ago(one.started)} ago, log: {one.log_file})")
    uploads = "nothing is pending"
    if one.pending_files:
        amount = pending.amount(one.pending_files, one.pending_bytes)
        uploads = f"{amount} pending: {pending.states(one.pending_states)}"
    cache = f"{size(one.cache_used)} of {size(one.cache_size)}"
    memory = f", memory: {size(one.memory)}" if one.memory else ""
    return [
        click.style(head, bold=True),
        *_namespace_lines(one.namespaces),
        *_site_lines(one.sites),
        f"  cache: {cache}{memory}, {count(one.open_files, 'open file')}",
        f"  uploads: {uploads}",
        f"  uploaded: {size(one.uploaded_bytes)} since the mount{_pace(one)}",
    ]


def _pace(one: MountStatus) -> str:
    if one.upload_rate < 1:
        return ""
    on_its_way = one.pending_bytes - sum(file.left for file in one.pending if file.is_stuck)
    left = f", {_duration(on_its_way / one.upload_rate)} left" if on_its_way > 0 else ""
    return f", {size(round(one.upload_rate))}/s{left}"


def _namespace_lines(found: list[NamespaceStatus]) -> Iterator[str]:
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        mode = "read-only" if one.read_only else f"write {one.write}"
        reason = f": {one.reason}" if one.reason else ""
        state = "needs login" if one.needs_login else one.state
        line = printable(f"  {one.name:<{width}}  {state:<10}  {mode:<13}  {one.url}{reason}")
        yield click.style(line, fg="red") if one.state == "failed" else line


def _site_lines(sites: list[SiteStatus]) -> Iterator[str]:
    """Describe the sites that have a connection."""
    for site in sites:
        if site.connections or site.requests:
            kind = {"sftp": "SSH", "s3": "S3"}.get(site.kind, site.kind)
            what = count(site.connections, f"{kind} connection")
            channels = f", {count(site.channels, 'channel')}" if site.kind != "s3" else ""
            under_way = count(site.requests, "request")
            names = ", ".join(site.namespaces)
            yield printable(f"  {what}{channels}, {under_way} under way: {names}")


def _file_lines(one: MountStatus, rates: Rates, room: int) -> list[str]:
    lines = [_file_line(one, file, rates.of(one, file)) for file in one.pending]
    hidden = one.pending_files - len(lines)
    if hidden or len(lines) > room:
        shown = max(0, room - 1)
        hidden += max(0, len(lines) - shown)
        lines = [*lines[:shown], f"    and {count(hidden, 'more file')}"]
    return lines


def _file_line(one: MountStatus, file: PendingFile, rate: float) -> str:
    path = pending.path_of(one, file).removeprefix(f"{one.mountpoint}/")
    if file.is_stuck:
        line = f"    {file.state:<9}  {path}  {size(file.size)}, {ago(file.since)}: {file.reason}"
        return click.style(printable(line), fg="red")
    if file.state == "uploading":
        done = (file.size - file.left) / file.size if 0 <= file.left <= file.size > 0 else 0.0
        bar = "#" * int(done * _BAR)
        speed = f", {size(round(rate))}/s" if rate >= 1 else ""
        return printable(
            f"    uploading  {path}  [{bar:-<{_BAR}}] {done:4.0%} of {size(file.size)}{speed}"
        )
    return printable(f"    {file.state:<9}  {path}  {size(file.size)}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- the terminal -------------------------------------------------------------------------------


@contextmanager
def _screen() -> Iterator[None]:
    """Switch to the alternate screen, and back; SIGTERM switches back, too."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    sys.stdout.write(_ENTER)
    try:
        yield
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _keys() -> Iterator[bool]:
    """Switch to reading each key as it is pressed; yield whether that is possible."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:
        yield False
        return
    try:
        tty.setcbreak(0)
        yield True
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _draw(lines: list[str]) -> None:
    """Draw over the last frame, so that nothing flickers."""
    sys.stdout.write("\x1b[H" + "\r\n".join(f"{line}\x1b[K" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def _quits(has_keys: bool) -> bool:
    """Wait for the next frame, or for q; return whether to quit."""
    ready, _, _ = select.select([0] if has_keys else [], [], [], SECONDS)
    return bool(ready) and os.read(0, 64).lower() in (b"q", b"")
