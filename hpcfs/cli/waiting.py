"""Waiting for uploads: time limits, and a notice about a remote that is out of reach."""

from __future__ import annotations

import time

import click

from hpcfs.cli.output import complain
from hpcfs.control.control import ControlRequest, WorkProgress

timeout_option = click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="Wait no longer for uploads; the daemon goes on with them. The exit code is then 3.",
)
OUT_OF_TIME = 3
"""The exit code for a timeout."""


def ends_at(timeout: float | None) -> float | None:
    """Return the end of the timeout in time.monotonic(); None for no limit."""
    return None if timeout is None else time.monotonic() + timeout


def left(end: float | None) -> float | None:
    """Return the seconds until `end`, at least 0; None for no limit."""
    return None if end is None else max(0.0, end - time.monotonic())


def sync_request(end: float | None, path: bytes = b"") -> ControlRequest:
    """Return the request that waits for uploads; a remote that is out of reach is tried until
    `end`."""
    patience = left(end)
    return (
        ControlRequest("sync", path)
        if patience is None
        else ControlRequest("sync", path, patience=patience)
    )


class OutageNotice:
    """Reports once why nothing progresses."""

    def __init__(self) -> None:
        self._reported = False

    def show(self, step: WorkProgress) -> None:
        """Report the reason, if there is one."""
        if step.reason and not self._reported:
            self._reported = True
            complain(f"waiting for a connection ({step.reason}); Ctrl-C stops only waiting")
