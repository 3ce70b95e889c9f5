"""Limits that a user sets to be gentle with a shared link."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support.mounts import RealHome, mounted

BYTES = 9_000_000
RATE = 3_000_000


@pytest.mark.parametrize("kind", ["sftp", "s3-rclone"])
def test_a_limit_of_the_bandwidth_holds_in_both_directions(
    kind: str, servers: Servers, real_home: RealHome
) -> None:
    served = servers.serve(kind).but(bandwidth_limit="3 MB")
    data = random.Random(3).randbytes(BYTES)
    served.inside.write("there", data)
    with mounted(real_home, {"ns": served}) as mount:
        took: dict[str, float] = {}

        def read(path: Path) -> None:
            assert path.read_bytes() == data

        def write(path: Path) -> None:
            path.write_bytes(data)

        for name, call in (("there", read), ("new", write)):
            began = time.monotonic()
            call(mount.path / "ns" / name)
            took[name] = time.monotonic() - began
        assert served.inside.read("new") == data
        least = (BYTES - RATE) / RATE  # a second of bursts, and of requests that are under way
        assert {name: at for name, at in took.items() if at < least} == {}
