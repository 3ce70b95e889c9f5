"""The random exerciser (tests/support/exerciser.py) on real mounts.

CI runs a few hundred steps on each kind of remote. For a long run:
    HPCFS_EXERCISE_STEPS=100000 pytest tests/mount/test_exerciser.py
and a failure is run again with HPCFS_EXERCISE_SEED, which it tells.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from tests.mount.conftest import Servers
from tests.support import exerciser
from tests.support.exerciser import Difference, Look, Outcome, Step
from tests.support.mounts import KINDS, WRITE_MODES, Mount, RealHome, in_write_mode, mounted

STEPS = int(os.environ.get("HPCFS_EXERCISE_STEPS", "0"))
SEED = int(os.environ.get("HPCFS_EXERCISE_SEED", "0"))
RUN_STEPS = 300
"""Then both directories start empty again."""
SHRINK_SECONDS = 60.0


def _excused(kind: str, step: Step, found: Outcome, wanted: Outcome) -> bool:
    """The differences that docs/semantics.md explains."""
    looks = isinstance(found[1], Look) and isinstance(wanted[1], Look)
    if looks:
        return _times_aside(kind, found[1], wanted[1])  # type: ignore[arg-type]
    return False


def _times_aside(kind: str, found: Look, wanted: Look) -> bool:
    """S3 has no times of directories that change with what is in them."""
    is_folder = wanted.mode.startswith("d")
    return is_folder and kind != "sftp" and found.mode == wanted.mode


@pytest.mark.parametrize("write", WRITE_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_do_what_they_do_locally(
    kind: str, write: str, servers: Servers, real_home: RealHome, tmp_path: Path
) -> None:
    served = in_write_mode(servers.serve(kind), write)
    with mounted(real_home, {"ns": served}, expected=[".*"]) as mount:
        for number in range(max(1, STEPS // RUN_STEPS)):
            seed = SEED or (secrets.randbits(32) if STEPS else 1 + number)
            _exercise(mount, kind, seed, tmp_path / "local")


def _exercise(mount: Mount, kind: str, seed: int, local: Path) -> None:
    todo = exerciser.steps(seed, RUN_STEPS, links=kind == "sftp")

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
