"""What the commands print: safe for a terminal, and the same words everywhere.

Names, reasons and prompts may come from a remote: control characters, which could rewrite what the
terminal shows, are replaced before anything is printed.
"""

from __future__ import annotations

import sys
import time

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def printable(text: str) -> str:
    """One line without control characters or stray surrogates."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def complain(sentence: str) -> None:
    """A sentence on stderr. The newlines of a library's message become spaces."""
    print(f"hpcfs: {printable(' '.join(sentence.split()))}", file=sys.stderr)


def size(count: int) -> str:
    """Bytes for a reader: 1.2 GiB."""
    if count < 1024:
        return f"{count} B"
    power = min((count.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{count / 1024**power:.1f} {_UNITS[power]}"


def ago(since: float) -> str:
    """How long ago, in the largest unit that fits."""
    seconds = max(0, int(time.time() - since))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def count(number: int, one: str) -> str:
    return f"{number} {one}" if number == 1 else f"{number} {one}s"
