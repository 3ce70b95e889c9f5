"""Makes text safe to show: servers, file names and other programs may have put anything into it.

A control character can rewrite what a terminal shows, a line end can forge a line of a log, and a
stray surrogate can't be encoded. None of them is printable in the sense of `str.isprintable`.
"""

from __future__ import annotations

import json
from collections.abc import Callable


def printable(
    text: str, replacement: str | Callable[[str], str] = "\N{REPLACEMENT CHARACTER}"
) -> str:
    """Return the text as one line of printable characters.

    Each other character is replaced by `replacement`, or by what that returns for it.
    """
    if text.isprintable():
        return text
    replace = replacement if callable(replacement) else lambda char: replacement
    return "".join(char if char.isprintable() else replace(char) for char in text)


def one_line(text: str) -> str:
    """Return the words of the text with one space between them; other characters end a word."""
    return " ".join(printable(text, " ").split())


def as_in_python(char: str) -> str:
    r"""Return the character as Python's source writes it: \x1b, \n, \udcff."""
    return ascii(char)[1:-1]


def as_in_json(char: str) -> str:
    r"""Return the character as JSON writes it: \u001b, \n, \udcff."""
    return json.dumps(char)[1:-1]
