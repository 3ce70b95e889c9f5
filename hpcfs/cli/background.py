"""Starts the daemon in the background, and waits until it is known whether the mount works.

The child serves the mount. It keeps the terminal, to ask for passwords, until the mount answers;
then it reports to its parent over a pipe and leaves the terminal. The parent learns of any earlier
failure by a message, or by the end of the pipe when the child died. The fork happens before any
import of trio.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import msgspec

from hpcfs.cli import terminal
from hpcfs.cli.output import show_traceback
from hpcfs.config.config import Settings
from hpcfs.control import mountpoint
from hpcfs.control.control import MountStatus
from hpcfs.model.errors import SetupError
from hpcfs.system import mountinfo

STOP_SECONDS = 5.0
"""How long an interrupted child may take to tidy up before it is killed."""


class MountStartReport(msgspec.Struct, frozen=True):
    """The message from child to parent. Exactly one field is set."""

    status: MountStatus | None = None
    failure: str | None = None


def start(settings: Settings, *, debug: bool, owner: tuple[int, int] | None = None) -> MountStatus:
    """Start a child that serves the mount, and return the status once it has left the terminal.

    With `owner`, the two ends of a pipe, the mount lives until the writing end is closed, and no
    signal ends it. Raises SetupError where it failed; then nothing is mounted and no child is left.
    """
    child, line = run_child(
        partial(_serve, settings, debug=debug, owner=owner),
        partial(stop, settings=settings, patience=0.0),
    )
    report = msgspec.json.decode(line, type=MountStartReport) if line else MountStartReport()
    if report.status is None:
        stop(child, settings, patience=STOP_SECONDS)
        raise SetupError(report.failure or _sudden_end(settings))
    if failure := root_failure(settings, report.status):
        mountpoint.unmount(settings.mountpoint)
        stop(child, settings, patience=STOP_SECONDS)
        raise SetupError(failure)
    return report.status


def run_child(serve: Callable[[int], int], end: Callable[[int], None]) -> tuple[int, bytes]:
    """Fork a child that runs `serve`; return its pid and the line that it sent, empty if it ended
    before.

    `serve` gets the pipe for that line (see `send_line`), and returns the child's exit code. A
    parent that is interrupted meanwhile calls `end` with the child's pid.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reader)
        _run_in_child(serve, writer)
    os.close(writer)
    try:
        with terminal.restored(), _terminated_raises():
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return child, _read_line(reader)
    except BaseException:
        end(child)
        raise
    finally:
        os.close(reader)


def _run_in_child(serve: Callable[[int], int], writer: int) -> None:
    """Run `serve`, and end this process: it must not return into the caller's stack."""
    code = 1
    try:
        code = serve(writer)
    finally:
        with suppress(OSError, ValueError):  # the reader is gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def root_failure(settings: Settings, status: MountStatus) -> str | None:
    """Return why a mount whose root is a remote is of no use, else None. As with sshfs, such a
    mount is undone."""
    failed = [found for found in status.namespaces if found.state == "failed"]
    root = next((found for found in failed if found.name == settings.root_namespace), None)
    return f"{root.url}: {root.reason}" if root else None


def stop(child: int, settings: Settings, *, patience: float) -> None:
    """Wait `patience` seconds for the child's end, then end it; leave nothing mounted."""
    if not has_ended(child, patience):
        os.kill(child, signal.SIGTERM)
        if not has_ended(child, STOP_SECONDS):
            os.kill(child, signal.SIGKILL)
            has_ended(child, STOP_SECONDS)
    found = mountinfo.at(settings.mountpoint, mountpoint.mounts())
    if found is not None and mountpoint.is_dead(settings.mountpoint):
        mountpoint.unmount(settings.mountpoint, lazy=True)


@contextmanager
def _terminated_raises() -> Iterator[None]:
    """Raise SystemExit on SIGTERM: `timeout 5 hpcfs mount` must not leave a child that mounts
    later."""

    def give_up(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, give_up)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def has_ended(child: int, seconds: float) -> bool:
    """Wait for the child and reap it; return True as well where it was reaped before."""
    try:
        process = os.pidfd_open(child)
    except ProcessLookupError:
        return True
    try:
        ready, _, _ = select.select([process], [], [], seconds)
    finally:
        os.close(process)
    if ready:
        with suppress(ChildProcessError):
            os.waitpid(child, 0)
    return bool(ready)


def _read_line(reader: int) -> bytes:
    """Read the child's line; empty where the child ended before it sent one."""
    received = bytearray()
    while not received.endswith(b"\n"):
        chunk = os.read(reader, 65536)
        if not chunk:
            return b""
        received += chunk
    return bytes(received)


def _sudden_end(settings: Settings) -> str:
    return f"the daemon ended before the mount was ready; its log is {settings.log_file}"


def _serve(settings: Settings, writer: int, *, debug: bool, owner: tuple[int, int] | None) -> int:
    if owner is not None:
        os.close(owner[1])

    def leave_terminal(status: MountStatus) -> None:
        send_line(writer, msgspec.json.encode(MountStartReport(status=status)))
        detach()

    try:
        serve(
            settings,
            on_ready=leave_terminal,
            foreground=False,
            owner=owner[0] if owner is not None else None,
        )
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # reported to the parent, which prints it
        if debug:
            show_traceback(error)
        send_line(writer, msgspec.json.encode(MountStartReport(failure=sentence_of(error))))
        return 1
    return 0


def serve(
    settings: Settings,
    *,
    on_ready: Callable[[MountStatus], None],
    foreground: bool,
    owner: int | None = None,
) -> None:
    """Serve the mount in this process. Imports the daemon, whose cost other commands must not pay.

    trio wraps the exception that ends it, Ctrl-C too, in groups; the first one inside is raised.
    """
    from hpcfs.daemon import main

    try:
        main.serve(
            settings, ask=terminal.ask, on_ready=on_ready, foreground=foreground, owner=owner
        )
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def sentence_of(error: Exception) -> str:
    """Return the error as a sentence for the user."""
    from hpcfs.daemon import main

    if isinstance(error, main.MountFailed | SetupError):
        return str(error)
    return f"the daemon failed ({type(error).__name__}: {error}); 'hpcfs --debug mount' shows where"


def detach() -> None:
    """Leave the terminal and its session, as a daemon does."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def send_line(writer: int, text: bytes) -> None:
    """Send the line, and close the pipe. A parent that is gone needs no report."""
    data = memoryview(text + b"\n")
    with suppress(OSError):
        while data:
            data = data[os.write(writer, data) :]
        os.close(writer)
