"""The ssh connection of a tunnel is cut again and again while programs copy: no byte is lost, no
program fails, nobody lends a hand.

A few cuts of two of the combinations by default; HPCFS_FULL=1 in the environment cuts 50 times in
each direction of all of them (half an hour).
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mount.test_trees import WAYS, copy
from tests.support.link import Link, link_to
from tests.support.mounts import WRITE_MODES, Mount, mounted, until
from tests.support.seed import Seed, lead_through, seed
from tests.support.trees import MIB, SMALL_SIZES, Facts, Recipe, differences, facts_of, make_tree

FULL = os.environ.get("HPCFS_FULL") == "1"
CUTS = 50 if FULL else 3
TREE = Recipe(60, sizes=SMALL_SIZES, large=(20 * MIB, 5 * MIB, 1 * MIB + 1), directories=15)
BETWEEN_BYTES = (30_000, 15_000_000)
"""So much passes between cuts: the least is gone while mounts are still finding their way back."""
KINDS: dict[str, list[str]] = {"unix": [], "tcp": ["AllowStreamLocalForwarding no"]}
"""Of the forward, and what sshd is told to make it so."""
CASES = list(itertools.product(WAYS, WRITE_MODES, KINDS))
if not FULL:
    CASES = [("rsync -a", "back", "unix"), ("cp -a", "through", "tcp")]


class Cutter(threading.Thread):
    """In turn the session's processes on the login node are killed, and the link is cut. `count`
    times, each in the middle of what passes."""

    def __init__(self, found: Seed, link: Link, count: int) -> None:
        super().__init__(daemon=True)
        self._seed, self._link = found, link
        self._left = count
        self._over = threading.Event()
        self._random = random.Random(count)
        self.cuts = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while self._left and not self._over.is_set():
                self._cut_once()
        except BaseException as error:
            self.error = error

    def _cut_once(self) -> None:
        place = self._seed.place()
        wanted = self._link.relayed + self._random.randint(*BETWEEN_BYTES)
        while self._link.relayed < wanted:
            if self._over.wait(0.002):
                return
        if self._left % 2:
            self._seed.node.server.kill_sessions()
        else:
            self._link.cut()
            self._link.mend()
        self._left -= 1
        self.cuts += 1
        self._seed.until_elsewhere(place)

    def stop(self) -> None:
        self._over.set()
        self.join()


@contextmanager
def cutting(found: Seed, link: Link, count: int) -> Iterator[Cutter]:
    cutter = Cutter(found, link, count)
    cutter.start()
    try:
        yield cutter
    finally:
        cutter.stop()
    assert cutter.error is None, cutter.error
    assert cutter.cuts == count


@pytest.mark.timeout(1800 if FULL else 120)
@pytest.mark.parametrize(("way", "mode", "kind"), CASES)
def test_copies_both_ways(way: str, mode: str, kind: str, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_tree(tree, TREE)
    with seed(tmp_path, *KINDS[kind]) as found, link_to(found.node.server.port) as link:
        lead_through(link, found)
        found.start()
        served = found.served(write=mode, symlinks="follow")
        with mounted(found.home, {"laptop": served}, expected=["not uploaded yet"]) as mount:
            folder = mount.path / "laptop" / "data"
            with cutting(found, link, CUTS) as cutter:
                rounds = 0
                while cutter.is_alive():
                    rounds += 1
                    copy(way, tree, folder / f"new-{rounds}")
            _sync(mount)
            # rsync sets a directory's time again only where it sees another one: in back mode, when
            # a cut made it slow, that of before the uploads (docs/semantics.md).
            has_times = (way, mode) != ("rsync -a", "back")
            for number in range(1, rounds + 1):
                _is_same(tree, found.shared / f"new-{number}", has_times=has_times)
            with cutting(found, link, CUTS) as cutter:
                rounds = 0
                while cutter.is_alive():
                    rounds += 1
                    shutil.copytree(tree, found.shared / f"old-{rounds}", symlinks=True)
                    until((folder / f"old-{rounds}").exists)  # a listing may be a second old
                    copied = tmp_path / f"copied-{rounds}"
                    copy(way, folder / f"old-{rounds}", copied)
                    _is_same(tree, copied)
                    shutil.rmtree(copied)


def _sync(mount: Mount) -> None:
    done = mount.home.run("sync", mount.path)
    assert done.returncode == 0, done.stderr
    assert mount.status.pending == []


def _is_same(tree: Path, copied: Path, *, has_times: bool = True) -> None:
    """Without `has_times`, but for the times of directories."""
    facts = [facts_of(root) for root in (tree, copied)]
    if not has_times:
        facts = [{path: _timeless(fact) for path, fact in one.items()} for one in facts]
    found = differences(*facts)
    assert not found, "\n".join(found)


def _timeless(fact: Facts) -> Facts:
    return replace(fact, mtime=0) if stat.S_ISDIR(fact.type) else fact
