"""A tree of mixed files goes in by rsync and by cp, and comes back identical by a second mount.

All 2,000 files over SFTP in both ways. The S3 servers are slow (rclone's takes up to 80 ms for each
request when the machine is busy), so that by default they get fewer and smaller files;
HPCFS_FULL=1 in the environment runs 2,000 files of every size everywhere (half an hour).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support.mounts import KINDS, Mount, RealHome, mounted, run
from tests.support.trees import (
    LATIN_1,
    MIB,
    NAMES,
    NEWLINE,
    SMALL_SIZES,
    Recipe,
    differences,
    facts_of,
    make_tree,
)

FULL = os.environ.get("HPCFS_FULL") == "1"
TIMEOUT = 1800 if FULL else 280
SFTP = Recipe(2000, names=(*NAMES, NEWLINE, LATIN_1))
RCLONE = Recipe(2000 if FULL else 120, names=(*NAMES, NEWLINE))
MOTO = Recipe(2000 if FULL else 30)
SMALL = {} if FULL else {"sizes": SMALL_SIZES, "large": (64 * MIB, 17 * MIB)}
FEWER = {} if FULL else SMALL | {"large": (17 * MIB,)}  # moto takes 64 MiB apart in Python
RECIPES = {"sftp": SFTP, "s3-rclone": replace(RCLONE, **SMALL), "s3-moto": replace(MOTO, **FEWER)}

WAYS = ("rsync -a", "cp -a")


def recipe(kind: str, way: str) -> Recipe:
    """rsync gets the larger tree: it does more to each file."""
    whole = RECIPES[kind]
    return whole if FULL or way == "rsync -a" else replace(whole, count=whole.count * 2 // 5)


def copy(way: str, source: Path, target: Path) -> None:
    """Both make `target` a copy of `source`."""
    if way == "rsync -a":
        run("rsync", "-a", f"{source}/", f"{target}/", seconds=TIMEOUT)
    else:
        run("cp", "-aT", source, target, seconds=TIMEOUT)


def rsync_finds_to_do(source: Path, target: Path) -> str:
    return run("rsync", "-ai", f"{source}/", f"{target}/", seconds=TIMEOUT)


@pytest.mark.timeout(4 * TIMEOUT if FULL else 300)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_comes_back_identical(
    kind: str, way: str, servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    served = servers.serve(kind).but(symlinks="follow")  # some of its links lead out
    make_tree(tmp_path / "source", recipe(kind, way))
    wanted = facts_of(tmp_path / "source")
    with mounted(real_home, {"ns": served}) as mount:
        copy(way, tmp_path / "source", mount.path / "ns" / "tree")
        _check_second_mount(mount, wanted, tmp_path / "source")


def _check_second_mount(mount: Mount, wanted: dict[bytes, object], source: Path) -> None:
    """First with what the first mount cached, then with nothing."""
    mount.remount()
    assert rsync_finds_to_do(source, mount.path / "ns" / "tree") == ""
    mount.remount("--cache-dir", mount.home.path / "another-cache")
    assert differences(wanted, facts_of(mount.path / "ns" / "tree")) == []
    assert rsync_finds_to_do(source, mount.path / "ns" / "tree") == ""
