"""Decides which host keys are trusted: OpenSSH's rules, asked about and remembered as ssh does it.

Owns the only trust decision for SSH. A key that known_hosts has is trusted; a host that it does not
name is shown to the user, whose "yes" is written down; a host that it names with another key is
refused, whatever the user says. StrictHostKeyChecking, RevokedHostKeys, HostKeyAlias, CheckHostIP
and their like change that as they change it for ssh (ssh_config(5); sshconnect.c, check_host_key).
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import asyncssh
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from hpcfs.model.errors import HostKeyRefused, WrongSettings
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.ssh import knownhosts, revoked
from hpcfs.remotes.ssh.knownhosts import KnownHost

log = logging.getLogger(__name__)

DEFAULT_PORT = 22
QUESTIONS = 3
_UNWRITABLE = frozenset("@?*#[]|'\"\\")
"""A name with one of these would mean more than itself in known_hosts."""

Strictness = Literal["yes", "ask", "accept-new", "no"]
TrustedKeys = tuple[Sequence[asyncssh.SSHKey], Sequence[asyncssh.SSHKey], Sequence[asyncssh.SSHKey]]


@dataclass(frozen=True)
class Rules:
    """The rules by which the keys of one host are judged."""

    host: str
    port: int = DEFAULT_PORT
    alias: str | None = None
    """HostKeyAlias: the name to look up, whatever the port."""
    strict: Strictness = "ask"
    user_files: tuple[Path, ...] = ()
    """New keys go to the first."""
    global_files: tuple[Path, ...] = ()
    revoked_files: tuple[Path, ...] = ()
    hashes_names: bool = False
    checks_address: bool = False
    """CheckHostIP, where the host is reached without a proxy."""
    spares_loopback: bool = False
    """NoHostAuthenticationForLocalhost, likewise."""
    least_rsa_bits: int = 1024
    fingerprint_hash: str = "sha256"

    @property
    def name(self) -> str:
        """The host as known_hosts spells it."""
        return self.alias or spelt(self.host, self.port)

    @property
    def names(self) -> list[str]:
        """Return the names under which the host may be known: a key that is known for port 22 is
        known on another port too."""
        return [self.name] if self.alias else list(dict.fromkeys([self.name, self.host]))

    @property
    def files(self) -> tuple[Path, ...]:
        """The known_hosts files, the user's first."""
        return self.user_files + self.global_files

    @property
    def may_remember(self) -> bool:
        """Whether a key of this host can be added to a file."""
        return bool(self.user_files) and _UNWRITABLE.isdisjoint(self.host)


@dataclass(frozen=True)
class Judgement:
    """The judgement of a key that a server showed. `text` says why it is refused, or what to ask
    about."""

    key: asyncssh.SSHKey
    kind: Literal["trusted", "unproved", "unknown", "refused"]
    """`unproved` may go on by the user's own wish, but gets no password."""
    text: str = ""

    @property
    def is_trusted(self) -> bool:
        """Whether the connection may go on without a question."""
        return self.kind in ("trusted", "unproved")


@dataclass
class HostKeys:
    """Judges the host keys of one login."""

    rules: Rules
    _accepted: list[asyncssh.SSHKey] = field(default_factory=list)
    _found: dict[tuple[Path, str], list[KnownHost]] = field(default_factory=dict)
    """Lines of the files, read once: a file of thousands of hashed names takes a while."""

    def trusted(self, _host: str, _address: str, _port: int | None) -> TrustedKeys:
        """asyncssh's callback. It learns what it needs to judge certificates; each plain key comes
        to `judge`."""
        authorities = self._authorities()
        if not authorities:
            return (), (), ()
        return (), authorities, [*self._revoked(), *self._listed_as_revoked()]

    def algorithms(self, offered: Sequence[str], *, reorder: bool) -> list[str]:
        """Return the algorithms to ask for: first the kinds of key that are known for the host.
        Certificates only where an authority is known that could have signed them."""
        plain = [name for name in offered if "-cert-" not in name]
        has_authority = bool(self._authorities())
        if has_authority and not all(map(_is_plain_list, self.rules.revoked_files)):
            raise WrongSettings(
                f"RevokedHostKeys of {self.rules.host} is no plain list of keys, and by another "
                'hpcfs can\'t judge host certificates: set transport = "openssh"'
            )
        certificates = [name for name in offered if "-cert-" in name] if has_authority else []
        if not reorder or not plain:
            return [name for name in offered if name in plain or name in certificates] or [*offered]
        kinds = {name.decode() for entry in self._entries("") for name in entry.key.sig_algorithms}
        known = [name for name in plain if name in kinds]
        return [*certificates, *known, *(name for name in plain if name not in kinds)]

    def knows_host(self) -> bool:
        """Whether any key or authority is known for this host."""
        return any(self._entries("")) or bool(self._authorities())

    def judge(self, key: asyncssh.SSHKey, address: str) -> Judgement:
        """`address` is the server's, or empty where it is reached by a proxy."""
        if self.rules.spares_loopback and self.rules.alias is None and _is_loopback(address):
            return Judgement(key, "trusted")
        refusal = self._unusable(key)
        if refusal:
            return Judgement(key, "refused", refusal)
        if any(key == one for one in self._revoked()):
            return self._at_own_risk(key, f"the host key of {self.rules.name} is revoked")
        if key in self._accepted or any(key == entry.key for entry in self._entries("")):
            return self._at_known_host(key, address)
        offending = next(iter(self._plain(self.rules.name)), None)
        if offending is not None:
            return self._at_own_risk(key, self._changed(key, offending))
        return self._at_new_host(key)

    async def decide(self, judgement: Judgement, prompter: Prompter) -> None:
        """Returns when the user trusts the key from now on; raises HostKeyRefused otherwise."""
        if judgement.kind == "refused":
            raise HostKeyRefused(judgement.text)
        if not await self._user_trusts(judgement, prompter):
            raise HostKeyRefused(
                f"the host key of {self.rules.name} was not accepted, so nothing was sent there"
            )
        if not any(judgement.key == entry.key for entry in self._entries("")):
            self._remember(self.rules.name, judgement.key)
        self._accepted.append(judgement.key)

    # --- the cases ------------------------------------------------------------------------------

    def _unusable(self, key: asyncssh.SSHKey) -> str:
        """Why no rule could make the key good, or nothing."""
        bits = _rsa_bits(key)
        if bits is not None and bits < self.rules.least_rsa_bits:
            return (
                f"the host key of {self.rules.name} is RSA with {bits} bits, and RequiredRSASize "
                f"is {self.rules.least_rsa_bits}: the site must make a longer one"
            )
        for path in self.rules.revoked_files:
            try:
                if revoked.is_revoked(path, key):
                    return (
                        f"the host key of {self.rules.name} is revoked by {path} "
                        f"({self._shown(key)}): the server may be another one, ask the site"
                    )
            except OSError as error:
                return (
                    f"RevokedHostKeys names {path}, which can't be read ({error.strerror or error})"
                    f": so no host key of {self.rules.name} can be believed"
                )
        return ""

    def _at_known_host(self, key: asyncssh.SSHKey, address: str) -> Judgement:
        """The address that the name leads to may be known with another key."""
        where = spelt(address, self.rules.port)
        if not self.rules.checks_address or key in self._accepted or not address:
            return Judgement(key, "trusted")
        if _is_loopback(address) or address == self.rules.host:
            return Judgement(key, "trusted")
        entries = self._plain(where)
        if not entries and self.rules.may_remember:
            self._remember(where, key)
        if not entries or any(entry.key == key for entry in entries):
            return Judgement(key, "trusted")
        text = f"the host key of {self.rules.name} is not that of its address {where}"
        if self.rules.strict == "ask":
            return Judgement(key, "unknown", f"{text[0].upper()}{text[1:]}.")
        if self.rules.strict == "no":
            log.warning("%s", text)
            return Judgement(key, "trusted")
        return Judgement(key, "refused", f"{text}, and CheckHostIP is set: ask the site")

    def _at_new_host(self, key: asyncssh.SSHKey) -> Judgement:
        strict = self.rules.strict
        if not self.rules.may_remember:
            return Judgement(
                key,
                "refused",
                f"the host key of {self.rules.name} is unknown ({self._shown(key)}) and can't be "
                "written down (UserKnownHostsFile none): ssh goes no further either",
            )
        if strict == "yes":
            return Judgement(
                key,
                "refused",
                f"the host key of {self.rules.name} is unknown ({self._shown(key)}) and "
                "StrictHostKeyChecking is yes: add what ssh-keyscan prints to known_hosts after "
                "checking it",
            )
        if strict == "ask":
            return Judgement(key, "unknown", f"The host {self.rules.name} is not known yet.")
        self._remember(self.rules.name, key)
        self._accepted.append(key)
        return Judgement(key, "trusted")

    def _at_own_risk(self, key: asyncssh.SSHKey, text: str) -> Judgement:
        """Let a changed or revoked key pass where StrictHostKeyChecking no does, as ssh does."""
        if self.rules.strict != "no":
            return Judgement(key, "refused", text)
        log.warning("%s; StrictHostKeyChecking is no, so it goes on without passwords", text)
        return Judgement(key, "unproved", text)

    def _changed(self, key: asyncssh.SSHKey, offending: KnownHost) -> str:
        return (
            f"the host key of {self.rules.name} is not the one in {offending.path} line "
            f"{offending.line} (it is now {self._shown(key)}): someone may be intercepting the "
            "connection; if the site confirms the new key, run "
            f"ssh-keygen -R '{self.rules.name}' -f {offending.path} and then 'hpcfs login'"
        )

    # --- what is known --------------------------------------------------------------------------

    def _entries(self, marker: knownhosts.Marker) -> Iterator[KnownHost]:
        """Return the entries for the host, on its port or on any."""
        for name in self.rules.names:
            yield from (entry for entry in self._find(name) if entry.marker == marker)

    def _plain(self, name: str) -> list[KnownHost]:
        return [entry for entry in self._find(name) if not entry.marker]

    def _find(self, name: str) -> Iterator[KnownHost]:
        for path in self.rules.files:
            if (path, name) not in self._found:
                self._found[path, name] = knownhosts.find(path, name)
            yield from self._found[path, name]

    def _authorities(self) -> list[asyncssh.SSHKey]:
        """Return the authorities; none where a revoked key may be let pass: asyncssh lets none
        pass."""
        if self.rules.strict == "no" and self._revoked():
            return []
        return [entry.key for entry in self._entries("@cert-authority")]

    def _revoked(self) -> list[asyncssh.SSHKey]:
        return [entry.key for entry in self._entries("@revoked")]

    def _listed_as_revoked(self) -> list[asyncssh.SSHKey]:
        """Return the revoked keys for certificates, which asyncssh judges. A list that can't be
        read is no list of keys."""
        lists = [path for path in self.rules.revoked_files if _is_plain_list(path)]
        return [key for path in lists for key in revoked.keys(path)]

    def _remember(self, name: str, key: asyncssh.SSHKey) -> None:
        path = self.rules.user_files[0] if self.rules.user_files else None
        if path is None or not self.rules.may_remember:
            return
        self._found.clear()
        try:
            knownhosts.add(path, name, key, hashed=self.rules.hashes_names)
        except OSError as error:
            log.warning("%s could not be written, so the key is not kept: %s", path, error)

    def _shown(self, key: asyncssh.SSHKey) -> str:
        kind = key.get_algorithm().removeprefix("ssh-").upper()
        return f"{kind} {key.get_fingerprint(self.rules.fingerprint_hash)}"

    async def _user_trusts(self, judgement: Judgement, prompter: Prompter) -> bool:
        kind, fingerprint = self._shown(judgement.key).split(" ", 1)
        text = (
            f"{judgement.text}\n"
            f"Its {kind} key has the fingerprint {fingerprint}\n"
            "Trust this key and connect (yes/no/fingerprint)? "
        )
        for _ in range(QUESTIONS):
            answer = await prompter.ask(text, echo=True)
            if answer is None:
                raise HostKeyRefused(
                    f"the host key of {self.rules.name} is unknown ({kind} {fingerprint}) and "
                    "there is no terminal to ask on: run 'hpcfs login' on one, or add what "
                    "ssh-keyscan prints to known_hosts after checking it"
                )
            answer = answer.strip()
            if answer == fingerprint or answer.lower() in ("yes", "no"):
                return answer.lower() != "no"
            text = "Please type yes, no or the fingerprint: "
        return False


def spelt(host: str, port: int) -> str:
    """Return a host and port as known_hosts has them."""
    return host if port == DEFAULT_PORT else f"[{host}]:{port}"


def _is_plain_list(path: Path) -> bool:
    try:
        return revoked.is_list_of_keys(path)
    except OSError:  # no key will be believed: judge
        return False


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _rsa_bits(key: asyncssh.SSHKey) -> int | None:
    return key.pyca_key.key_size if isinstance(key.pyca_key, RSAPublicKey) else None
