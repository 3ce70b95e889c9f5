"""`hpcfs tunnel --daemon`: a child that keeps the terminal until the tunnel is up, then leaves it.

As with mounts (background.py), the parent reports every earlier failure.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial

import msgspec

from hpcfs.cli import background
from hpcfs.cli.output import show_traceback
from hpcfs.laptop.status import TunnelStatus
from hpcfs.model.errors import SetupError

Serve = Callable[[Callable[[TunnelStatus], None]], None]
"""Runs the tunnel, and calls its argument with each status."""


class TunnelStartReport(msgspec.Struct, frozen=True):
    """The message from child to parent. Exactly one field is set."""

    status: TunnelStatus | None = None
    failure: str | None = None


def start(serve: Serve, *, debug: bool) -> TunnelStatus:
    """Start a child that runs the tunnel, and return the tunnel's status. Raises SetupError where
    it failed."""
    child, received = background.run_child(partial(_serve, serve, debug=debug), _end)
    report = (
        msgspec.json.decode(received, type=TunnelStartReport) if received else TunnelStartReport()
    )
    if report.status is None:
        _end(child)
        raise SetupError(report.failure or "the tunnel ended before it stood")
    return report.status


def _end(child: int) -> None:
    """End the child; it gets time, since it may be cleaning up on the cluster."""
    if not background.has_ended(child, 0.0):
        os.kill(child, signal.SIGTERM)
        if not background.has_ended(child, 2 * background.STOP_SECONDS):
            os.kill(child, signal.SIGKILL)
            background.has_ended(child, background.STOP_SECONDS)


def _serve(serve: Serve, writer: int, *, debug: bool) -> int:
    left = False

    def show(status: TunnelStatus) -> None:
        nonlocal left
        if status.state == "up" and not left:
            left = True
            background.send_line(writer, msgspec.json.encode(TunnelStartReport(status=status)))
            background.detach()

    try:
        serve(show)
    except Exception as error:  # reported to the parent, which prints it
        if debug:
            show_traceback(error)
        text = str(error) if isinstance(error, SetupError) else f"the tunnel failed ({error!r})"
        if not left:
            background.send_line(writer, msgspec.json.encode(TunnelStartReport(failure=text)))
        return 1
    return 0
