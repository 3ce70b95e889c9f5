"""Waiting for uploads: how long, and what is said of a remote that is out of reach meanwhile."""

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
"""The exit code."""


def ends_at(timeout: float | None) -> float | None:
    """By time.monotonic; None for never."""
    return None if timeout is None else time.monotonic() + timeout


def left(end: float | None) -> float | None:
    return None if end is None else max(0.0, end - time.monotonic())


def sync_request(end: float | None, path: bytes = b"") -> ControlRequest:
    """A remote that is out of reach is tried until then."""
    patience = left(end)
    return (
        ControlRequest("sync", path)
        if patience is None
        else ControlRequest("sync", path, patience=patience)
    )


class OutageNotice:
    """Tells once why nothing moves."""

    def __init__(self) -> None:
        self._told = False

    def show(self, step: WorkProgress) -> None:
        if step.reason and not self._told:
            self._told = True
            complain(f"waiting for a connection ({step.reason}); Ctrl-C stops only waiting")
