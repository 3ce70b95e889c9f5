"""A program that is stuck in close(2) on a dead link keeps nothing mounted, and loses nothing."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import Mount, RealHome, mounted, run, until
from tests.support.stuck import Stuck

Starts = Callable[[str], Linked]
EXPECTED = (
    "reach|nothing answers|not answer|connection|ended|no answer|kept|lost|closed|not.* uploaded",
)
PROMPT = 12.0
"""Seconds; on a machine that is not busy with other tests it takes five."""


@contextmanager
def stuck(kind: str, linked: Starts, home: RealHome) -> Iterator[tuple[Linked, Mount, Stuck]]:
    far = linked(kind)
    far.served.inside.write("d/other", b"there")
    served = far.served.but(patience="10 min")  # so that none ends by itself
    with (
        mounted(home, {"ns": served}, expected=EXPECTED) as mount,
        closing(Stuck.start("close", mount.path / "ns" / "d")) as program,
    ):
        far.link.freeze()
        program.go()
        try:
            yield far, mount, program
        finally:
            far.link.mend()


def _nothing_is_lost(far: Linked, mount: Mount) -> None:
    """The next mount lists the file, or uploads it."""
    far.link.mend()
    if not mount.is_mounted:
        mount.mount()
    until(lambda: mount.kept or far.served.inside.exists("d/close"))
    for kept in mount.kept:
        assert Path(kept.data).read_bytes() == b"bytes"
    if not mount.kept:
        until(lambda: far.served.inside.read("d/close") == b"bytes")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sftp", ()), ("s3-rclone", ()), ("sftp", ("--timeout", "1"))],
    ids=["sftp", "s3", "timeout"],
)
def test_hpcfs_umount(
    kind: str, options: tuple[str, ...], linked: Starts, real_home: RealHome
) -> None:
    with stuck(kind, linked, real_home) as (far, mount, program):
        daemon = mount.status.pid
        began = time.monotonic()
        done = real_home.run("umount", *options, mount.path)
        assert time.monotonic() - began < PROMPT
        # With a timeout the daemon may end a moment too late to be waited for.
        assert done.returncode in ((1, 3) if options else (1,)), done.stderr
        assert "uploaded" in done.stderr
        assert "in use" not in done.stderr
        assert program.process.wait(PROMPT) == 1, "close(2) told that it failed"
        until(lambda: not Path(f"/proc/{daemon}").exists(), PROMPT)
        _nothing_is_lost(far, mount)


@pytest.mark.parametrize(("kind", "how"), [("s3-rclone", "SIGTERM"), ("sftp", "lazily")])
def test_other_ends(kind: str, how: str, linked: Starts, real_home: RealHome) -> None:
    with stuck(kind, linked, real_home) as (far, mount, program):
        daemon = mount.status.pid
        if how == "SIGTERM":
            run("kill", f"-{signal.SIGTERM.name}", str(daemon))
        else:
            run("fusermount3", "-u", "-z", mount.path)
        until(lambda: not Path(f"/proc/{daemon}").exists(), PROMPT)
        assert program.process.wait(PROMPT) == 1, "close(2) told that it failed"
        _nothing_is_lost(far, mount)


def test_a_signal_first_and_then_fusermount(linked: Starts, real_home: RealHome) -> None:
    """The kernel refuses to unmount while close(2) waits; a killed program is gone at once."""
    with stuck("sftp", linked, real_home) as (far, mount, program):
        daemon = mount.status.pid
        program.end(signal.SIGKILL, PROMPT)
        run("fusermount3", "-u", mount.path)
        until(lambda: not Path(f"/proc/{daemon}").exists(), PROMPT)
        _nothing_is_lost(far, mount)
