"""`hpcfs tunnel --daemon`: a child that keeps the terminal until the tunnel stands, then leaves it.

As with mounts (background.py): whatever happens before, the parent tells.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

import msgspec

from hpcfs.cli import background, terminal
from hpcfs.errors import SetupError
from hpcfs.tunnel.status import TunnelStatus

Serve = Callable[[Callable[[TunnelStatus], None]], None]
"""Runs the tunnel; what it is given is called with each status."""


class Report(msgspec.Struct, frozen=True):
    """Exactly one of them, from child to parent."""

    status: TunnelStatus | None = None
    failure: str | None = None


def start(serve: Serve, *, debug: bool) -> TunnelStatus:
    """The status of the tunnel, which a child serves. Raises SetupError when it failed."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reader)
        _serve_in_child(serve, writer, debug=debug)
    os.close(writer)
    try:
        with terminal.restored(), background.terminated_raises():
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            received = background.read_line(reader)
    except BaseException:
        _end(child)
        raise
    finally:
        os.close(reader)
    report = msgspec.json.decode(received, type=Report) if received else Report()
    if report.status is None:
        _end(child)
        raise SetupError(report.failure or "the tunnel ended before it stood")
    return report.status


def _end(child: int) -> None:
    """It may be tidying up on the cluster."""
    if not background.has_ended(child, 0.0):
        os.kill(child, signal.SIGTERM)
        if not background.has_ended(child, 2 * background.STOP_SECONDS):
            os.kill(child, signal.SIGKILL)
            background.has_ended(child, background.STOP_SECONDS)


def _serve_in_child(serve: Serve, writer: int, *, debug: bool) -> None:
    """Never returns."""
    code = 1
    left = False

    def show(status: TunnelStatus) -> None:
        nonlocal left
        if status.state == "up" and not left:
            left = True
            background.send_line(writer, msgspec.json.encode(Report(status=status)))
            background.detach()

    try:
        serve(show)
        code = 0
    except Exception as error:  # reported to the parent, which prints it
        if debug:
            traceback.print_exception(error)
        text = str(error) if isinstance(error, SetupError) else f"the tunnel failed ({error!r})"
        if not left:
            background.send_line(writer, msgspec.json.encode(Report(failure=text)))
    finally:
        with suppress(OSError, ValueError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
