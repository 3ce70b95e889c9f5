"""Turns what ssh says about one host (options.py) into the options of a connection.

Owns the choice of connection options. asyncssh reads no file of its own here: it is told
everything. Options that it can't obey are refused by name, where that would lead elsewhere,
log in as another or trust more or less; what concerns terminals, forwards and ControlMaster is
passed over.
Jump hosts are ours to connect (their keys and prompts matter as much as the target's), and so is a
ProxyCommand (proxy.py).
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shlex
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import asyncssh

from hpcfs.model import ssh_syntax
from hpcfs.model.errors import WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh import algorithms, identities, options
from hpcfs.remotes.ssh.algorithms import FAST_CIPHER as FAST_CIPHER
from hpcfs.remotes.ssh.hostkeys import HostKeys, Rules, Strictness
from hpcfs.remotes.ssh.identities import Identities
from hpcfs.remotes.ssh.options import SshOptions
from hpcfs.remotes.ssh.tokens import Tokens

KEEPALIVE_SECONDS = 5
KEEPALIVES_MISSED = 2
"""So a connection counts as dead after 15 s without a sign of life: it is asked after 5 and 10 s of
silence, and given up after 15 (asyncssh and ssh count alike)."""
KEY_EXCHANGE = "curve25519-sha256"
"""Between a mount and a laptop, which are both ours."""
CHANNEL_WINDOW_BYTES = 80 * 1024 * 1024
"""How many bytes one channel may carry before we confirm them, which asyncssh does at half of it.
So more than twice what is ever asked for at once (sftp/flow.py), and that is what bounds memory.
Asyncssh's own 2 MiB is 35 MB/s at 20 ms."""

PROMPTS = 3
_STRICT: dict[str, Strictness] = {
    "yes": "yes", "true": "yes", "ask": "ask", "accept-new": "accept-new",
    "no": "no", "off": "no", "false": "no",
}  # fmt: skip
_FAMILIES = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}
_REFUSED = ("BindInterface", "KnownHostsCommand")
_NOT_OBEYED = {
    "ControlMaster": "hpcfs makes a connection of its own, one for all folders of a login",
    "VerifyHostKeyDNS": "a key that only the DNS vouches for is asked about",
    "SecurityKeyProvider": "keys on security keys need the package fido2",
    "LocalCommand": "hpcfs runs none",
}
"""Options that are passed over and that somebody may miss."""


@dataclass(frozen=True)
class Hop:
    """One host to log in to: the target, or a jump host on the way."""

    alias: str
    host: str
    port: int
    user: str
    jumps: tuple[str, ...]
    identities: Identities = field(compare=False)
    host_keys: HostKeys = field(compare=False)
    options: dict[str, Any] = field(compare=False, repr=False)
    proxy_command: str | None = None
    """For a shell, its tokens replaced."""
    passes_socket: bool = False
    """The ProxyCommand hands a connected socket over (ProxyUseFdpass)."""
    prompts: int = PROMPTS
    """How often a password is asked for; 0 with BatchMode."""
    asks: bool = True
    family: int = socket.AF_UNSPEC
    bind_address: str | None = None
    not_obeyed: tuple[str, ...] = ()
    """Sentences about what of the configuration is passed over."""

    @property
    def shown(self) -> str:
        """The alias, with the host name where that is another one."""
        return self.alias if self.alias == self.host else f"{self.alias} ({self.host})"

    @property
    def is_direct(self) -> bool:
        """Whether neither a jump host nor a ProxyCommand leads there."""
        return not self.jumps and self.proxy_command is None


async def read_hop(site: SshSite, *, is_behind: bool = False) -> Hop:
    """Read what the configuration says about `site`. With `is_behind` its own ProxyJump or
    ProxyCommand do not count: the hosts of a chain before it lead there.

    Raises WrongSettings when it can't be read, understood or obeyed, and Unreachable when ssh does
    not answer.
    """
    _must_be_names(site.host, site.user)
    answer = await options.read(site)
    try:
        return await asyncio.to_thread(_read_hop, site, answer, is_behind)
    except (asyncssh.KeyImportError, ValueError) as error:
        raise WrongSettings(
            f"the SSH configuration for {site.host} is not usable: {error}"
        ) from None
    except OSError as error:
        name = error.filename or site.ssh_config or "~/.ssh/config"
        raise WrongSettings(f"{name} can't be read: {error.strerror}") from None


def jump_site(jump: str, site: SshSite) -> SshSite:
    """Return one element of ProxyJump, "[user@]host[:port]" or "ssh://[user@]host[:port]", as a
    site of its own. Raises WrongSettings."""
    place = jump.partition("://")[2].rstrip("/") if jump.lower().startswith("ssh://") else jump
    user, _, address = place.rpartition("@")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or ("]" not in host and ":" in host):
        host, port = address, ""
    host = host.removeprefix("[").removesuffix("]")
    _must_be_names(host, user or None, f" in ProxyJump {jump}")
    return SshSite(
        host=host,
        user=user or None,
        port=int(port) if port else None,
        ssh_config=site.ssh_config,
        connect_timeout=site.connect_timeout,
    )


def _must_be_names(host: str, user: str | None, where: str = "") -> None:
    reason = "ssh takes no such characters either"
    if not ssh_syntax.is_valid_host(host):
        raise WrongSettings(f"{host!r}{where} is no host name: {reason}")
    if user is not None and not ssh_syntax.is_valid_user(user):
        raise WrongSettings(f"{user!r}{where} is no user name: {reason}")


def _read_hop(site: SshSite, answer: SshOptions, is_behind: bool) -> Hop:
    host, port = answer.one("hostname") or site.host, int(answer.one("port") or 22)
    user = answer.one("user") or ""
    alias = answer.one("hostkeyalias")
    tokens = Tokens.of(
        site.host, host=host, port=port, user=user, alias=alias, jump=_last_jump(answer),
        digest=(answer.one("controlpath") or "").removeprefix("/"),
    )  # fmt: skip
    if site.transport == "asyncssh":
        _refuse_what_we_cannot_do(site, answer)
    jumps = () if is_behind else _jumps(answer, tokens)
    command = None if is_behind or jumps else _proxy_command(answer, tokens, host, user)
    hop = Hop(
        alias=site.host,
        host=host,
        port=port,
        user=user,
        jumps=jumps,
        identities=identities.read(site, answer, tokens),
        host_keys=HostKeys(Rules(host)),
        options={},
        proxy_command=command,
        passes_socket=command is not None and answer.is_on("proxyusefdpass"),
        prompts=int(answer.one("numberofpasswordprompts") or PROMPTS),
        asks=not answer.is_on("batchmode"),
        family=_FAMILIES.get(answer.one("addressfamily") or "", socket.AF_UNSPEC),
        bind_address=answer.one("bindaddress"),
        not_obeyed=tuple(_not_obeyed(answer)),
    )
    is_direct = hop.is_direct and not is_behind
    host_keys = HostKeys(_rules(answer, hop, alias, is_direct=is_direct))
    return replace(hop, host_keys=host_keys, options=_options(answer, hop, host_keys))


def _options(answer: SshOptions, hop: Hop, host_keys: HostKeys) -> dict[str, Any]:
    """asyncssh's, but for the keys. Where nothing else is said, ssh's own defaults."""
    offered = algorithms.host_keys(answer)
    named = answer.names("hostkeyalgorithms")
    default = SshOptions(answer.defaults).names("hostkeyalgorithms")
    return {
        "config": None,
        "username": hop.user,
        "known_hosts": host_keys.trusted,
        "host_key_alias": host_keys.rules.alias,
        "server_host_key_algs": host_keys.algorithms(
            offered, reorder=named[: len(default)] == default
        ),
        "kex_algs": algorithms.key_exchanges(answer),
        "encryption_algs": algorithms.ciphers(answer),
        "mac_algs": algorithms.macs(answer),
        "signature_algs": algorithms.signatures(answer),
        "compression_algs": None,
        "tcp_keepalive": answer.one("tcpkeepalive") != "no",
        **_ways_in(answer, hop),
        "agent_forwarding": False,
        "x11_forwarding": False,
        "env": [line for line in answer.all("setenv") if "=" in line],
        "connect_timeout": None,
        "login_timeout": 0,
        "keepalive_interval": KEEPALIVE_SECONDS,
        "keepalive_count_max": KEEPALIVES_MISSED,
    }


def _ways_in(answer: SshOptions, hop: Hop) -> dict[str, Any]:
    """Return the ways to authenticate that are tried, in order."""

    def is_off(option: str) -> bool:
        return answer.one(option) in ("no", "false")

    preferred = answer.names("preferredauthentications")
    is_hostbased = answer.is_on("hostbasedauthentication") and answer.is_on("enablesshkeysign")
    return {
        "public_key_auth": not is_off("pubkeyauthentication"),
        "password_auth": not is_off("passwordauthentication"),
        "kbdint_auth": not is_off("kbdinteractiveauthentication")
        and not is_off("challengeresponseauthentication"),
        "gss_auth": answer.is_on("gssapiauthentication"),
        "gss_kex": answer.is_on("gssapikeyexchange"),
        "gss_delegate_creds": answer.is_on("gssapidelegatecredentials"),
        "host_based_auth": is_hostbased,
        "client_host_keysign": is_hostbased and hop.is_direct,
        **({"gss_host": identity} if (identity := answer.one("gssapiserveridentity")) else {}),
        **({"preferred_auth": preferred} if preferred else {}),
    }


def _rules(answer: SshOptions, hop: Hop, alias: str | None, *, is_direct: bool) -> Rules:
    """`is_direct`: the server's address is known."""
    strict = (answer.one("stricthostkeychecking") or "ask").lower()
    users = answer.files("userknownhostsfile")
    globals_ = answer.files("globalknownhostsfile")
    return Rules(
        host=hop.host,
        port=hop.port,
        alias=alias.lower() if alias else None,
        strict=_STRICT.get(strict, "yes"),
        user_files=_known_hosts_files(
            users if users is not None else [f"~/.ssh/known_hosts{end}" for end in ("", "2")]
        ),
        global_files=_known_hosts_files(
            globals_
            if globals_ is not None
            else [f"/etc/ssh/ssh_known_hosts{end}" for end in ("", "2")]
        ),
        revoked_files=_known_hosts_files(answer.files("revokedhostkeys") or []),
        hashes_names=answer.is_on("hashknownhosts"),
        checks_address=is_direct and answer.is_on("checkhostip"),
        spares_loopback=is_direct and answer.is_on("nohostauthenticationforlocalhost"),
        least_rsa_bits=int(answer.one("requiredrsasize") or 1024),
        fingerprint_hash=(answer.one("fingerprinthash") or "sha256").lower(),
    )


def _known_hosts_files(names: list[str]) -> tuple[Path, ...]:
    """ssh has replaced the ~ already."""
    return tuple(options.at_home(Path(name).expanduser()) for name in names)


# --- the way there --------------------------------------------------------------------------------


def _last_jump(answer: SshOptions) -> str:
    """The host of %j."""
    jump = (answer.one("proxyjump") or "").rpartition(",")[2]
    return jump_site(jump, SshSite("")).host if jump and "%" not in jump else ""


def _jumps(answer: SshOptions, tokens: Tokens) -> tuple[str, ...]:
    """ssh makes a command line of them, which a shell reads: so a backslash of a user's name must
    be doubled there, here as there."""
    text = answer.one("proxyjump")
    if text is None:
        return ()
    found = []
    for part in text.split(","):
        jump = tokens.command(part.strip())
        if "$" in jump or "*" in jump:
            raise WrongSettings(
                f"ProxyJump {part.strip()} needs a shell, which hpcfs does not ask: name the host"
            )
        found.append("".join(shlex.split(jump)))
    return tuple(jump for jump in found if jump)


def _proxy_command(answer: SshOptions, tokens: Tokens, host: str, user: str) -> str | None:
    """Return the ProxyCommand. Raises WrongSettings where a name would mean more to the shell than
    itself."""
    text = answer.one("proxycommand")
    if text is None:
        return None
    _must_be_names(host, user, ", for its ProxyCommand,")
    if text == "-":
        raise WrongSettings(
            "ProxyCommand - means ssh's own stdin, which a mount does not have: name a command"
        )
    return tokens.command(text)


# --- what can't be obeyed -------------------------------------------------------------------------


def _refuse_what_we_cannot_do(site: SshSite, answer: SshOptions) -> None:
    """Passing these over would lead elsewhere or trust more or less than the user said."""
    options: list[str] = [option for option in _REFUSED if answer.one(option.lower())]
    provider = answer.one("pkcs11provider")
    if provider and os.path.exists(provider) and importlib.util.find_spec("pkcs11") is None:
        options.append("PKCS11Provider")
    if options:
        shown = ", ".join(f"{option} {answer.one(option.lower())}" for option in options)
        raise WrongSettings(
            f"the SSH configuration for {site.host} has {shown}, which hpcfs can't obey: "
            'set transport = "openssh", which lets ssh do it, or take the line out for this host'
        )


def _not_obeyed(answer: SshOptions) -> list[str]:
    return [
        f"{option} {answer.one(option.lower())} is passed over: {why}"
        for option, why in _NOT_OBEYED.items()
        if answer.is_chosen(option.lower())
        and answer.one(option.lower()) not in (None, "no", "false")
    ]
