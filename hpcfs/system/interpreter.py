"""How hpcfs starts Python, so that no file of the current directory is ever run.

`python -m` and `python -c` put the current directory before all else on the search path, and an
entry of PYTHONPATH that is empty or relative means it, too: whoever types `hpcfs mount` in
/scratch/shared would run a `msgspec.py` that somebody left there. `-P` ends the first, the root
directory, in which only the administrator makes files, the second. (`-I` would also hide what
`pip install --user` and environment modules installed.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

SAFE_DIRECTORY = "/"
"""To be the current directory of each Python that is started."""


def given_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program of the user's: with PATH and PYTHONPATH as they were before
    `hpcfs`, the shell script, cleaned them."""
    theirs = dict(environ)
    for name in ("PATH", "PYTHONPATH"):
        given = theirs.pop(f"HPCFS_{name}", None)
        if given is not None:
            theirs[name] = given
    return theirs


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of hpcfs's; to be started in SAFE_DIRECTORY."""
    return [sys.executable, "-P", "-m", module, *arguments]
