"""The log file of a process that serves: a mount's daemon, a tunnel."""

from __future__ import annotations

import logging
import os
from pathlib import Path

MAX_LOG_BYTES = 10 * 1024 * 1024
"""A larger one is put aside when the next process begins."""


def set_up(file: Path, level: str, who: str, *, to_stderr: bool) -> None:
    """From now on what is logged goes into the file, which is the user's alone."""
    if file.exists() and file.stat().st_size > MAX_LOG_BYTES:
        file.replace(file.with_suffix(".log.1"))
    os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    handlers: list[logging.Handler] = [logging.FileHandler(file)]
    if to_stderr:
        handlers.append(logging.StreamHandler())
    logging.basicConfig(
        level=level,
        handlers=handlers,
        format=f"%(asctime)s {who}[%(process)d] %(levelname)s %(message)s",
        force=True,
    )
