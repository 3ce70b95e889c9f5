"""OpenSSH's syntax for hosts, users and the words of a configuration line.

A host and a user come from a command line, a shared configuration or a colleague's rclone.conf, and
end in a ProxyCommand's %h and %r, which a shell reads. So the rules are OpenSSH's own (ssh.c since
CVE-2023-51385), applied wherever such a name comes in.
"""

from __future__ import annotations

from itertools import pairwise

_NOT_IN_HOSTS = frozenset("'`\"$\\;&<>|(){},")
_NOT_IN_USERS = frozenset("'`\";&<>|(){}")


class BadQuotes(ValueError):
    """Raised for a quote that does not end."""


def is_valid_host(name: str) -> bool:
    """Return whether this is a name, address or alias that may be given to ssh."""
    return (
        bool(name)
        and not name.startswith("-")
        and not any(_is_control(letter) or letter.isspace() for letter in name)
        and _NOT_IN_HOSTS.isdisjoint(name)
    )


def is_valid_user(name: str) -> bool:
    """Return whether this is a remote user's name; CAMPUS\\alice is one."""
    return (
        bool(name)
        and not name.startswith("-")
        and not name.endswith("\\")
        and not any(_is_control(letter) for letter in name)
        and not any(a.isspace() and b == "-" for a, b in pairwise(name))
        and _NOT_IN_USERS.isdisjoint(name)
    )


def split(line: str) -> list[str]:
    """The words of a line of ssh_config, its keyword first. Raises BadQuotes.

    A # at the beginning of a word ends the line; a backslash escapes quotes, itself and, outside
    quotes, a space, and is itself before anything else.
    """
    keyword, rest = _keyword(line.strip(" \t\r\n\f"))
    if not keyword or keyword.startswith("#"):
        return []
    return [keyword, *_words(rest)]


def _keyword(line: str) -> tuple[str, str]:
    """Split off the keyword, which ends at whitespace or at one =."""
    if line.startswith('"'):
        keyword, _, rest = line[1:].partition('"')
    else:
        end = next((i for i, letter in enumerate(line) if letter in " \t="), len(line))
        keyword, rest = line[:end], line[end:]
    rest = rest.lstrip(" \t")
    if rest.startswith("="):
        rest = rest[1:]
    return keyword.lower(), rest


def _words(text: str) -> list[str]:
    words: list[str] = []
    place = 0
    while place < len(text):
        if text[place] in " \t":
            place += 1
        elif text[place] == "#":
            break
        else:
            word, place = _word(text, place)
            words.append(word)
    return words


def _word(text: str, place: int) -> tuple[str, int]:
    """The word that begins there, and where it ends."""
    letters: list[str] = []
    quote = ""
    while place < len(text) and (quote or text[place] not in " \t"):
        letter, following = text[place], text[place + 1 : place + 2]
        if (
            letter == "\\"
            and following
            and (following in "'\"\\" or (not quote and following == " "))
        ):
            letters.append(following)
            place += 1
        elif letter == quote:
            quote = ""
        elif not quote and letter in "'\"":
            quote = letter
        else:
            letters.append(letter)
        place += 1
    if quote:
        raise BadQuotes(f"the quote {quote} does not end")
    return "".join(letters), place


def _is_control(letter: str) -> bool:
    return ord(letter) < 32 or ord(letter) == 127
