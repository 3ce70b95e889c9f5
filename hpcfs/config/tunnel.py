"""The settings of `hpcfs tunnel`: the [tunnel] table of the configuration, and the command line.

HOST is an alias of ~/.ssh/config, user@host, sftp://user@host:port, or the name of an sftp
namespace of the configuration, whose settings then apply to the tunnel too.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcfs.config import config, urls, values
from hpcfs.config.config import Config
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import SshSite
from hpcfs.system import paths

KEYS = ("host", "name", "shares", "bind")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_BIND = re.compile(r"[A-Za-z0-9_.:-]+(%\w+)?")


@dataclass(frozen=True, slots=True)
class TunnelSettings:
    """The settings of one run. `shown` is the host as the user named it; `shares` are as they wrote
    them."""

    site: SshSite
    shown: str
    name: str
    shares: tuple[str, ...]
    bind: str | None
    log_level: str


@dataclass(frozen=True, slots=True)
class _TunnelTable:
    """The values of the [tunnel] table."""

    host: str | None = None
    name: str | None = None
    shares: tuple[str, ...] = ()
    bind: str | None = None


def load(
    file: Path | None,
    host: str | None,
    name: str | None = None,
    shares: Sequence[str] = (),
    bind: str | None = None,
) -> TunnelSettings:
    """Combine command line and configuration; the command line takes precedence. Raises
    SetupError."""
    chosen = file or paths.config_file()
    known, given = Config({}), _TunnelTable()
    if file is not None or chosen.exists():
        text = config.read(chosen)
        known = config.parse(text, chosen, needs_namespaces=False)
        given = _read(text, chosen)
    wanted = host or given.host
    if wanted is None:
        raise SetupError(
            "say where the tunnel leads: 'hpcfs tunnel login3 --share ~/data', or write it "
            f"into a [tunnel] table of {chosen}"
        )
    return TunnelSettings(
        site=_site(wanted, known),
        shown=wanted,
        name=name or given.name or default_name(),
        shares=tuple(shares) or given.shares,
        bind=bind or given.bind,
        log_level=known.log_level,
    )


def default_name() -> str:
    """Return this machine's short host name, reduced to what a tunnel's name may contain."""
    short = socket.gethostname().partition(".")[0]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", short).strip("-")[:64] or "laptop"


def tunnel_name(value: object) -> str:
    """Return the value if a tunnel may have that name. Raises BadValue."""
    name = values.text(value)
    if not _NAME.fullmatch(name):
        raise values.BadValue(f"must be at most 64 letters, digits, '.', '_' and '-', not {name!r}")
    return name


def bind_address(value: object) -> str:
    """Return the value if it is a name or address that mounts can connect to, so no wildcard.
    Raises BadValue."""
    address = values.text(value)
    if not _BIND.fullmatch(address) or address in ("0.0.0.0", "::"):  # noqa: S104 - refused
        raise values.BadValue(
            f"must be the login node's name or address as compute nodes reach it, not {address!r}"
        )
    return address


def _read(text: str, file: Path) -> _TunnelTable:
    table = config.tunnel_table(text, file)
    if table is None:
        return _TunnelTable()
    table.refuse_unknown(KEYS)
    return _TunnelTable(
        host=table.get("host", values.text, None),
        name=table.get("name", tunnel_name, None),
        shares=table.get("shares", _texts, ()),
        bind=table.get("bind", bind_address, None),
    )


def _texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise values.BadValue('must be a list of folders, such as ["~/data", "code=~/src:ro"]')
    return tuple(value)


def _site(host: str, known: Config) -> SshSite:
    namespace = known.namespaces.get(host)
    if namespace is not None:
        if not isinstance(namespace.site, SshSite):
            raise SetupError(f"{host} is a namespace without an SSH server: name one of type sftp")
        return namespace.site
    url = host if "://" in host else f"{host.removesuffix(':')}:"
    site = urls.parse(url, urls.UrlContext(connect_timeout=config.DEFAULT_CONNECT_TIMEOUT)).site
    if not isinstance(site, SshSite):
        raise SetupError(f"{host} is no SSH server: a tunnel leads to the login node of a cluster")
    return site
