"""Stuck programs end by Ctrl-C and kill, whatever they wait for, and nothing they wrote is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import RealHome, mounted, until
from tests.support.stuck import CALLS, OLD_BYTES, OLD_FILES, Stuck

Starts = Callable[[str], Linked]
KINDS = ("sftp", "s3-rclone")
EXPECTED = ("reach|nothing answers|connection|ended|no answer|kept|lost|closed|not uploaded",)
PROMPT = 5.0
"""Seconds; it takes less than one on a machine that is not busy with other tests."""
SIGNALS = {
    signal.SIGINT: tuple(CALLS),
    signal.SIGKILL: tuple(CALLS),
    signal.SIGTERM: ("stat", "close"),
    signal.SIGHUP: ("read", "rename"),
    signal.SIGQUIT: ("open", "fsync"),
}


def _is_uploaded(far: Linked, path: str) -> bool:
    return far.served.inside.exists(path) and far.served.inside.read(path) == b"bytes"


@pytest.mark.parametrize("kind", KINDS)
def test_a_stuck_program_ends_with_the_signal(
    kind: str, linked: Starts, real_home: RealHome
) -> None:
    far = linked(kind)
    wanted = [(call, number) for number, calls in SIGNALS.items() for call in calls]
    for call, number in wanted:
        name = call if call in OLD_FILES else "other"
        far.served.inside.write(f"{call}-{number}/{name}", b"x" * OLD_BYTES)
    with mounted(real_home, {"ns": far.served}, expected=EXPECTED) as mount, ExitStack() as stack:
        programs = []
        for call, number in wanted:
            program = Stuck.start(call, mount.path / "ns" / f"{call}-{number}")
            programs.append((stack.enter_context(closing(program)), number))
        far.link.freeze()
        for program, _ in programs:
            program.go()
        for program, number in programs:
            program.end(number, PROMPT)
        closed = [f"close-{number}/close" for number, calls in SIGNALS.items() if "close" in calls]
        assert set(closed) <= {one.path for one in mount.status.pending}
        far.link.mend()
        for path in closed:
            until(partial(_is_uploaded, far, path), what="what was closed is there")
        until(lambda: mount.status.pending_files == 0)
        assert os.listdir(mount.path / "ns" / f"open-{signal.SIGINT}") == ["open"]
