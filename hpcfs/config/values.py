"""The values that configuration keys may have: one reader for each kind.

A reader returns the value as the program uses it, or raises BadValue with the end of a sentence
that begins with the key's name. In local paths ~ and $VARIABLES are replaced; in remote ones not.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from hpcfs.config import urls
from hpcfs.model import ssh_syntax
from hpcfs.model.errors import SetupError
from hpcfs.system.disk import MinFree
from hpcfs.tunnel import file as rendezvous

MIN_DISK_SIZE = 16 * 1024**2
"""The smallest cache: below this a few files that are read at once would evict each other. The
smallest journal: below this a few files that are written at once would wait for each other."""
MIN_RATE = 64 * 1000
"""Bytes per second; with less, 1 MiB would take longer than an answer is waited for."""
TRANSPORTS = ("asyncssh", "openssh")
WRITE_MODES = ("through", "back")
SYMLINK_MODES = ("contain", "follow", "hide")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|sec|seconds?|min|minutes?|h|hours?|d|days?)?")
_SECONDS_OF = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LONGEST_DURATION = 7 * 86400.0
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")


WriteMode = Literal["through", "back"]
"""close(2) waits for the remote (through) or the local journal (back)."""
SymlinkMode = Literal["contain", "follow", "hide"]
"""Symbolic links of a remote may lead into their namespace only, or anywhere; or they are
hidden."""


class BandwidthLimit(NamedTuple):
    """Limits of transfers in bytes per second; 0 is none."""

    down: int = 0
    up: int = 0


UNLIMITED = BandwidthLimit()


class BadValue(ValueError):
    """The value is invalid. The message is the end of a sentence: "must be ..., not ..."."""


def size(value: object) -> int:
    """Read a size in bytes: "20 GiB" (powers of 1024), "500MB" (powers of 1000), "64k" (of 1024) or
    a number."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise BadValue(f'must be a size such as "20 GiB" or a number of bytes, not {_shown(value)}')
    number, prefix, binary, unit = match.groups()
    if binary and not prefix:
        raise BadValue(f'must be a size such as "20 GiB", not {_shown(value)}')
    base = 1000 if unit and prefix and not binary else 1024
    return int(float(number) * base ** _UNITS[prefix.lower()])


def disk_size(value: object) -> int:
    """Read how many bytes of the local disk the cache, or the journal, may take: at least 16
    MiB."""
    found = size(value)
    if found < MIN_DISK_SIZE:
        raise BadValue(f"must be at least 16 MiB, not {_shown(value)}")
    return found


def min_free(value: object) -> MinFree:
    """Read the room that must stay free on the cache's disk: a size, or a part of the disk such as
    "5%"."""
    match = _PERCENT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match and float(match[1]) <= 90:
        return MinFree(percent=float(match[1]))
    try:
        return MinFree(size=size(value))
    except BadValue:
        raise BadValue(
            f'must be a size such as "5 GiB" or a part such as "5%", not {_shown(value)}'
        ) from None


def local_path(value: object) -> Path:
    """Read an absolute path of this machine; ~ and $VARIABLES are replaced."""
    path = os.path.expanduser(os.path.expandvars(text(value)))
    if unset := re.search(r"\$\{?(\w+)", path):
        raise BadValue(f"names ${unset[1]}, which is not set")
    if not os.path.isabs(path):
        raise BadValue(f"must be an absolute path or begin with ~, not {_shown(value)}")
    return Path(os.path.normpath(path))


def text(value: object) -> str:
    """Read a text that is not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise BadValue(f"must be a text in quotes that is not empty, not {_shown(value)}")
    return value


def maybe_empty_text(value: object) -> str:
    """Read a text."""
    return value if value == "" and isinstance(value, str) else text(value)


def boolean(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise BadValue(f"must be true or false, not {_shown(value)}")
    return value


def port(value: object) -> int:
    """Read a TCP port."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise BadValue(f"must be a port from 1 to 65535, not {_shown(value)}")
    return value


def count(value: object) -> int:
    """Read a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10_000:
        raise BadValue(f"must be a number from 1 to 10000, not {_shown(value)}")
    return value


def seconds(value: object) -> float:
    """Read a positive number of seconds."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadValue(f"must be a number of seconds above 0, not {_shown(value)}")
    return float(value)


def duration(value: object) -> float:
    """Read a time from 1 second to 7 days: a number of seconds, or as in "30 s", "15 min", "2 h".
    Returns seconds."""
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found:
        length = float(found[1]) * _SECONDS_OF[(found[2] or "s")[0]]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        length = float(value)
    else:
        length = 0.0
    if not 1 <= length <= _LONGEST_DURATION:
        raise BadValue(f'must be a time of 1 s to 7 d, as in "15 min", not {_shown(value)}')
    return length


def rates(value: object) -> BandwidthLimit:
    """Read limits of transfers, in bytes per second: "10 MB" for both directions, or a table such
    as { up = "2 MB", down = "20 MB" }, where what is missing is not limited."""
    if isinstance(value, dict):
        unknown = sorted(set(value) - {"up", "down"})
        if unknown or not value:
            raise BadValue('must be a rate, or a table with "up", "down" or both')
        return BandwidthLimit(_rate(value.get("down", 0)), _rate(value.get("up", 0)))
    return BandwidthLimit(_rate(value), _rate(value))


def _rate(value: object) -> int:
    text = value.strip().removesuffix("/s") if isinstance(value, str) else value
    found = size(text)
    if 0 < found < MIN_RATE:
        raise BadValue(f"must be at least 64 kB a second, not {_shown(value)}")
    return found


def log_level(value: object) -> str:
    """Read a log level, in upper case."""
    if not isinstance(value, str) or value.upper() not in LOG_LEVELS:
        raise BadValue(f"must be one of {', '.join(LOG_LEVELS)}, not {_shown(value)}")
    return value.upper()


def tunnel(value: object) -> str:
    """Read the name of a tunnel."""
    if not isinstance(value, str) or not rendezvous.is_valid_name(value):
        raise BadValue(f"must be the name that 'hpcfs tunnel' was given, not {_shown(value)}")
    return value


def share_path(value: object) -> str:
    """Read a path in a tunnel's shares: a share, or a folder in one."""
    return "/" + text(value).strip("/")


def kind(value: object) -> str:
    """Read the type of a namespace."""
    if value not in ("sftp", "s3", "tunnel"):
        raise BadValue(f'must be "sftp", "s3" or "tunnel", not {_shown(value)}')
    return str(value)


def transport(value: object) -> str:
    """Read the SSH client to use: asyncssh or openssh."""
    return _one_of(TRANSPORTS, value)


def write_mode(value: object) -> WriteMode:
    """Read a write mode."""
    return "back" if _one_of(WRITE_MODES, value) == "back" else "through"


def symlink_mode(value: object) -> SymlinkMode:
    """Read a symlink mode."""
    chosen = _one_of(SYMLINK_MODES, value)
    return "follow" if chosen == "follow" else "hide" if chosen == "hide" else "contain"


def _one_of(allowed: Sequence[str], value: object) -> str:
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(str(value).lower(), allowed, 1, cutoff=0.5)
    hint = f": did you mean {near[0]}?" if near else ""
    quoted = [f'"{one}"' for one in allowed]
    choice = f"{', '.join(quoted[:-1])} or {quoted[-1]}"
    raise BadValue(f"must be {choice}, not {_shown(value)}{hint}")


def table(value: object) -> dict[str, object]:
    """Read a table."""
    if not isinstance(value, dict):
        raise BadValue(f"must be a table, as in [namespaces.home], not {_shown(value)}")
    return value


def host(value: object) -> str:
    """Read an SSH host: alias, host or user@host."""
    name = text(value)
    if re.search(r"[\s/]|^-|^[^@]*:[^@]*@|^[^:]*:[^:]*$", name):
        raise BadValue("must be an alias, host or user@host, without port, path or password")
    if "@" in name:
        user(name.rpartition("@")[0])
    if not ssh_syntax.is_valid_host(name.rpartition("@")[2] or "-"):
        raise BadValue(f"has characters that ssh takes in no host name: {_shown(value)}")
    return name


def user(value: object) -> str:
    """Read an SSH user name."""
    name = text(value)
    if not ssh_syntax.is_valid_user(name):
        raise BadValue(f"has characters that ssh takes in no user name: {_shown(value)}")
    return name


def sftp_path(value: object) -> str:
    """Read a path on an SFTP server, in the form of `urls.home_path`."""
    try:
        return urls.home_path(maybe_empty_text(value))
    except SetupError as error:
        raise BadValue(f"is not usable: {error}") from None


def bucket(value: object) -> str:
    """Read the name of a bucket."""
    try:
        name, rest = urls.split_bucket(text(value))
    except SetupError:
        name, rest = "", ""
    if rest or not name:
        raise BadValue(
            f"must be the bucket's bare name, TENANT:BUCKET or an access point's ARN, "
            f"not {_shown(value)}"
        )
    return name


def prefix(value: object) -> str:
    """Read a key prefix, without slashes at its ends."""
    return maybe_empty_text(value).strip("/")


def endpoint(value: object) -> str:
    """Read the URL of an S3 endpoint."""
    try:
        urls.check_endpoint(text(value))
    except SetupError as error:
        raise BadValue(f"is not usable: {error}") from None
    return text(value)


def file_text(value: object) -> str:
    """Read a local path, as text."""
    return str(local_path(value))


def _shown(value: object) -> str:
    """Return the value as TOML writes it, short enough for one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a table"
    shown = repr(value) if not isinstance(value, str) else f'"{value}"'
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
