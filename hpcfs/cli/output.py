"""Formats the commands' output: safe for a terminal, and with the same words everywhere.

Names, reasons and prompts may come from a remote: control characters, which could rewrite what the
terminal shows, are replaced before anything is printed.
"""

from __future__ import annotations

import sys
import time
import traceback

from hpcfs.system.text import as_in_json, printable

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def json_line(value: object) -> str:
    """Return one line of JSON for programs; characters that could control a terminal are
    escaped."""
    import msgspec  # only here: --help must not wait for it

    return printable(msgspec.json.encode(value).decode(), as_in_json)


def show_traceback(error: BaseException) -> None:
    """Print the traceback on stderr; it may contain text of a remote."""
    for part in traceback.format_exception(error):
        print("\n".join(map(printable, part.rstrip("\n").split("\n"))), file=sys.stderr)


def complain(sentence: str) -> None:
    """Print a sentence on stderr. The newlines of a library's message become spaces."""
    print(f"hpcfs: {printable(' '.join(sentence.split()))}", file=sys.stderr)


def size(count: int) -> str:
    """Return a number of bytes for a reader: 1.2 GiB."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.1f} {_UNITS[power]}"


def ago(since: float) -> str:
    """Return how long ago that was, in the largest unit that fits."""
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def count(number: int, one: str) -> str:
    """Return a number with its noun in the singular or plural."""
    return f"{number} {one}" if number == 1 else f"{number} {one}s"
