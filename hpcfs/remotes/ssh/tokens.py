"""Expands the tokens of ssh_config (%h, %r, ...) where `ssh -G` leaves them to the connection: in
the names of files and in commands."""

from __future__ import annotations

import os
import pwd
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcfs.model.errors import WrongSettings

_TOKEN = re.compile(r"%(.?)", re.DOTALL)
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_IN_COMMANDS = "hknpr"
"""Those of ProxyCommand and ProxyJump."""


@dataclass(frozen=True)
class Tokens:
    """The values of the tokens for one host (ssh_config(5), TOKENS)."""

    values: Mapping[str, str]

    @classmethod
    def of(
        cls,
        given: str,
        *,
        host: str,
        port: int,
        user: str,
        alias: str | None,
        jump: str,
        digest: str,
    ) -> Tokens:
        """`given` is the host as the user named it, `alias` its HostKeyAlias, `jump` the jump host,
        and `digest` what ssh says that %C is, or empty."""
        machine = socket.gethostname()
        values = {
            "d": str(Path("~").expanduser()),
            "h": host,
            "i": str(os.getuid()),
            "j": jump,
            "k": alias or given,
            "L": machine.partition(".")[0],
            "l": machine,
            "n": given,
            "p": str(port),
            "r": user,
            "u": local_user(),
        }
        return cls(values | {"C": digest} if digest else values)

    def path(self, text: str) -> Path:
        """Expand the tokens of a file's name, and ~ and ${VARIABLES} too."""
        return Path(_VARIABLE.sub(_variable, self._expand(os.path.expanduser(text), self.values)))

    def command(self, text: str) -> str:
        """Expand the tokens of a command line (ProxyCommand, KnownHostsCommand)."""
        return self._expand(text, {token: self.values[token] for token in _IN_COMMANDS})

    def _expand(self, text: str, values: Mapping[str, str]) -> str:
        def value(match: re.Match[str]) -> str:
            if match[1] == "%":
                return "%"
            if match[1] not in values:
                raise WrongSettings(f"ssh knows no token {match[0]} in {text!r}")
            return values[match[1]]

        return _TOKEN.sub(value, text)


def local_user() -> str:
    """ssh asks the user database, not the environment."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in some containers
        return os.environ.get("LOGNAME") or os.environ.get("USER") or str(os.getuid())


def _variable(match: re.Match[str]) -> str:
    value = os.environ.get(match[1])
    if value is None:
        raise WrongSettings(f"the SSH configuration names ${match[1]}, which is not set")
    return value
