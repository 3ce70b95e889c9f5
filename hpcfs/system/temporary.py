"""Makes temporary directories: in $TMPDIR, unless other users may replace what is in it.

Whoever may rename an entry of the parent directory can put another one in our directory's place:
with a program that ssh runs (remotes/ssh/askpass_server.py), or with files that a job takes for its
own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcfs.model.errors import SetupError
from hpcfs.system import ownership, paths


def make(prefix: str) -> Path:
    """Make a directory for this user alone, which stays. Raises OSError, and SetupError where there
    is no safe place."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=_place()))


@contextmanager
def directory(prefix: str) -> Iterator[Path]:
    """Make such a directory, and remove it with its content when the block ends. Raises as `make`
    does."""
    with tempfile.TemporaryDirectory(prefix=prefix, dir=_place()) as name:
        yield Path(name)


def _place() -> Path:
    given = Path(tempfile.gettempdir())
    reason = ownership.unsafe_reason(given)
    if not reason:
        return given
    if not ownership.unsafe_reason(paths.SHARED_TMP):
        return paths.SHARED_TMP
    raise SetupError(
        f"{given} is not safe from others ({reason}): set TMPDIR to a directory of your own"
    )
