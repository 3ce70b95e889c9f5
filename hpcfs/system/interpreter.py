"""How hpcfs starts Python, so that it never runs a file of the current directory.

`python -m` and `python -c` put the current directory first on the search path, and an empty or
relative entry of PYTHONPATH means it, too. A user who types `hpcfs mount` in /scratch/shared would
run a `msgspec.py` that somebody left there. `-P` prevents the first. Starting in the root
directory, where only the administrator makes files, prevents the second. (`-I` would also hide what
`pip install --user` and environment modules installed.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

SAFE_DIRECTORY = "/"
"""The current directory for each Python process that hpcfs starts."""


def given_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a program of the user's, with PATH and PYTHONPATH as they were
    before the shell script `hpcfs` cleaned them."""
    theirs = dict(environ)
    for name in ("PATH", "PYTHONPATH"):
        given = theirs.pop(f"HPCFS_{name}", None)
        if given is not None:
            theirs[name] = given
    return theirs


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs a module of hpcfs. Start it in SAFE_DIRECTORY."""
    return [sys.executable, "-P", "-m", module, *arguments]
