"""The log file of a long-running process: a mount's daemon, or a tunnel.

Logged text may come from a server. Each message gets one line, and control characters reach neither
the file nor the terminal of a reader: no escape sequence, no line that imitates another message.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from hpcfs.model.errors import SetupError
from hpcfs.system.text import as_in_python, printable

MAX_LOG_BYTES = 10 * 1024 * 1024
"""A larger log is renamed when the next process begins."""
MAX_LINE = 4000
"""Characters of one line. So a talkative server fills no disk."""

FORMAT = "%(asctime)s {who}[%(process)d] %(levelname)s %(message)s"


def escaped(text: str) -> str:
    """Return the text as one line of printable characters; others are written as in Python's
    source."""
    if len(text) > MAX_LINE:
        text = f"{text[:MAX_LINE]}… (cut)"
    return printable(text, as_in_python)


class Formatter(logging.Formatter):
    """Formats one escaped line for each message. `who` is the kind of process."""

    def __init__(self, who: str) -> None:
        super().__init__(FORMAT.format(who=who))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the escaped message."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Return the traceback, each line escaped."""
        return "\n".join(map(escaped, super().formatException(ei).split("\n")))


def open_private(file: Path) -> int:
    """Open a log file for appending, make it if it is missing, and return its descriptor.

    Raises OSError. Symbolic links are not followed, and a file with another name (hard link) is
    refused: whoever may rename in a directory above could otherwise have log lines appended to any
    file of the user's.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(file, flags, 0o600)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_nlink != 1:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "this is no file of yours alone", str(file))
    return descriptor


class _OwnFile(logging.FileHandler):
    """A handler that opens its file with `open_private`."""

    def _open(self) -> TextIOWrapper:
        descriptor = open_private(Path(self.baseFilename))
        return os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def set_up(file: Path, level: str, who: str, *, to_stderr: bool) -> None:
    """Log into the file, which is the user's alone, from now on. Raises SetupError."""
    if file.exists() and file.stat().st_size > MAX_LOG_BYTES:
        file.replace(file.with_suffix(".log.1"))
    try:
        handlers: list[logging.Handler] = [_OwnFile(file)]
    except OSError as error:
        raise SetupError(f"the log {file} can't be written: {error.strerror}") from None
    if to_stderr:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(Formatter(who))
    logging.basicConfig(level=level, handlers=handlers, force=True)
