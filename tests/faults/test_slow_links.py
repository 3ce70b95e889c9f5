"""A link that is slow is waited for; one that only drips counts as one that stalls."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

import pytest

from tests.faults.conftest import Linked
from tests.support.mounts import RealHome, errno_of, mounted

Starts = Callable[[str], Linked]
PATIENCE = 3.0
CLEAR = (errno.EHOSTUNREACH, errno.ETIMEDOUT)
KINDS = ("sftp", "s3-rclone")


@pytest.mark.parametrize("kind", KINDS)
def test_a_slow_link_is_not_one_that_stalls(kind: str, linked: Starts, real_home: RealHome) -> None:
    """No piece of the file is whole within the patience, but bytes come all the time."""
    far = linked(kind)
    content = os.urandom(450_000)
    far.served.inside.write("file", content)
    options = ("--patience", f"{PATIENCE:g}")
    with mounted(real_home, {"ns": far.served}, *options, expected=(".",)) as mount:
        os.stat(mount.path / "ns" / "file")
        far.link.rate = 100_000
        began = time.monotonic()
        assert (mount.path / "ns" / "file").read_bytes() == content
        assert time.monotonic() - began > PATIENCE, "else this shows nothing"
        far.link.rate = None


def test_a_drip_counts_as_a_link_that_stalls(linked: Starts, real_home: RealHome) -> None:
    far = linked("sftp")
    far.served.inside.write("file", os.urandom(700_000))
    options = ("--patience", f"{PATIENCE:g}")
    with mounted(real_home, {"ns": far.served}, *options, expected=(".",)) as mount:
        os.stat(mount.path / "ns" / "file")
        far.link.rate = 2_000
        began = time.monotonic()
        assert errno_of(lambda: (mount.path / "ns" / "file").read_bytes()) in CLEAR
        assert time.monotonic() - began < 10 * PATIENCE
        far.link.rate = None
