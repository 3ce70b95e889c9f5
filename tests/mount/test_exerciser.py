"""The random exerciser (tests/support/exerciser.py) on real mounts.

CI runs some steps on each kind of remote and in each write mode. For a long run:
    HPCFS_EXERCISE_STEPS=100000 pytest tests/mount/test_exerciser.py
and a failure is run again with HPCFS_EXERCISE_SEED, which it tells.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support import exerciser
from tests.support.exerciser import Difference, Look, Outcome, Side, Step
from tests.support.mounts import KINDS, WRITE_MODES, Mount, RealHome, in_write_mode, mounted

STEPS = int(os.environ.get("HPCFS_EXERCISE_STEPS", "0"))
SEED = int(os.environ.get("HPCFS_EXERCISE_SEED", "0"))
RUN_STEPS = 300
"""Then both directories start empty again."""
SHRINK_SECONDS = 60.0


def _is_time_of_folder(kind: str, step: Step, found: Outcome, wanted: Outcome) -> bool:
    one, two = found[1], wanted[1]
    if kind == "sftp, through" or not isinstance(one, Look) or not isinstance(two, Look):
        return False
    return one.mode == two.mode and one.mode[0] == "d"


def _is_link_to_folder(kind: str, step: Step, found: Outcome, wanted: Outcome) -> bool:
    return step[0] == "link" and (found[1], wanted[1]) == ("EPERM", "EACCES")


EXCUSES: dict[str, Callable[[str, Step, Outcome, Outcome], bool]] = {
    "S3 has no times of directories that change with what is in them, and in `back` mode a"
    " directory's is the remote's, which lacks what waits in it": _is_time_of_folder,
    "of two reasons to refuse a link the kernel tells another one first": _is_link_to_folder,
}
"""The differences that can't be helped; docs/semantics.md has them too."""


def _excused(kind: str, step: Step, found: Outcome, wanted: Outcome) -> bool:
    return any(excuse(kind, step, found, wanted) for excuse in EXCUSES.values())


@pytest.mark.parametrize("write", WRITE_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_do_what_they_do_locally(
    kind: str, write: str, servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    served, local = in_write_mode(servers.serve(kind), write), tmp_path / "local"
    with mounted(real_home, {"ns": served}, expected=[" WARNING "]) as mount:
        for number in range(max(1, STEPS // RUN_STEPS)):
            seed = SEED or (secrets.randbits(32) if STEPS else 1 + number)
            _exercise(mount, f"{kind}, {write}", seed, local)
        mount.umount()
        for path in local.rglob("*"):
            if path.is_file() and not path.is_symlink():
                on_server = served.inside.read(f"tree/{path.relative_to(local)}")
                assert on_server == path.read_bytes(), path
        mount.mount()
        sides = Side(mount.path / "ns" / "tree"), Side(local)
        exerciser.compare_trees(
            sides,
            lambda *of: _is_count_of_links(*of) or _excused(f"{kind}, {write}", *of),
            "mounted again",
        )


def _is_count_of_links(step: Step, found: Outcome, wanted: Outcome) -> bool:
    """SFTP tells none: in another mount, two names are two files."""
    one, two = found[1], wanted[1]
    if not isinstance(one, Look) or not isinstance(two, Look):
        return False
    return Look(one.mode, one.size, two.links, one.mtime) == two


def _exercise(mount: Mount, kind: str, seed: int, local: Path) -> None:
    scratch = local.with_name("scratch")
    todo = exerciser.steps(seed, RUN_STEPS, scratch, links=kind.startswith("sftp"))

    def attempt(steps: list[Step]) -> Difference | None:
        try:
            exerciser.run(
                exerciser.empty(mount.path / "ns" / "tree"),
                exerciser.empty(local),
                steps,
                lambda *of: _excused(kind, *of),
            )
        except Difference as difference:
            return difference
        return None

    if first := attempt(todo):
        fewer = exerciser.shrink(todo, lambda steps: attempt(steps) is not None, SHRINK_SECONDS)
        told = "\n".join(map(repr, fewer))
        raise AssertionError(
            f"HPCFS_EXERCISE_SEED={seed}: {first}\n{len(fewer)} steps are enough:\n{told}\n"
            f"{attempt(fewer)}"
        )
