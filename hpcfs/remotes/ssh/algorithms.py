"""Chooses the algorithms that a connection offers: those of the user's ssh, as far as asyncssh has
them.

Algorithms that a configuration names are offered in its order. Those that ssh offers by itself are
offered without SHA-1 and MD5, which old versions of it still have among their defaults, and with
AES-GCM first, since it is what saturates a link from Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from asyncssh.encryption import get_default_encryption_algs, get_encryption_algs
from asyncssh.kex import get_default_kex_algs, get_kex_algs
from asyncssh.mac import get_default_mac_algs, get_mac_algs
from asyncssh.public_key import (
    get_certificate_algs,
    get_default_public_key_algs,
    get_public_key_algs,
)

from hpcfs.model.errors import WrongSettings
from hpcfs.remotes.ssh.options import SshOptions

FAST_CIPHER = "aes128-gcm@openssh.com"
_GSS = "gss-"


def ciphers(options: SshOptions) -> list[str]:
    """Return the ciphers to offer, the quickest first where the user chose none."""
    found = _offered(options, "Ciphers", get_encryption_algs(), get_default_encryption_algs())
    if options.is_chosen("ciphers") or FAST_CIPHER not in found:
        return found
    return [FAST_CIPHER, *(name for name in found if name != FAST_CIPHER)]


def macs(options: SshOptions) -> list[str]:
    """Return the message authentication codes to offer."""
    return _offered(options, "MACs", get_mac_algs(), get_default_mac_algs())


def key_exchanges(options: SshOptions) -> list[str]:
    """Return the key exchanges to offer, Kerberos' first where they are asked for: asyncssh passes
    them over without a ticket."""
    plain = [name for name in get_default_kex_algs() if not name.startswith(_GSS.encode())]
    found = _offered(options, "KexAlgorithms", get_kex_algs(), plain)
    if not options.is_on("gssapikeyexchange"):
        return found
    known = {name.decode() for name in get_kex_algs()}
    named = (name.removesuffix("-") for name in options.names("gssapikexalgorithms"))
    return [name for name in named if name in known and not _is_weak(name)] + found


def signatures(options: SshOptions) -> list[str]:
    """Return the signature algorithms for the user's keys."""
    option = "PubkeyAcceptedAlgorithms"
    if option.lower() not in options.options and "pubkeyacceptedkeytypes" in options.options:
        option = "PubkeyAcceptedKeyTypes"  # its name before OpenSSH 8.5
    defaults = [name for name in get_default_public_key_algs() if name != b"ssh-rsa"]
    return _offered(options, option, get_public_key_algs(), defaults)


def host_keys(options: SshOptions) -> list[str]:
    """Return the host key algorithms in ssh's order, which the known keys of a host change
    (hostkeys.py). Certificates too."""
    defaults = [name for name in get_default_public_key_algs() if name != b"ssh-rsa"]
    known = [*get_certificate_algs(), *get_public_key_algs()]
    return _offered(options, "HostKeyAlgorithms", known, [*get_certificate_algs(), *defaults])


def _offered(
    options: SshOptions, option: str, known: Iterable[bytes], defaults: Iterable[bytes]
) -> list[str]:
    """Return the algorithms to offer. Raises WrongSettings when asyncssh has none of what the
    configuration names."""
    have = {name.decode() for name in known}
    named: Sequence[str] = options.names(option.lower()) or [name.decode() for name in defaults]
    found = [name for name in named if name in have]
    if not options.is_chosen(option.lower()):
        found = [name for name in found if not _is_weak(name)]
    if not found:
        raise WrongSettings(
            f"{option} of the SSH configuration names only what hpcfs does not have: "
            f'{", ".join(named)}; add another, or set transport = "openssh"'
        )
    return found


def _is_weak(name: str) -> bool:
    return "sha1" in name or "md5" in name or name.endswith(("-cbc", "arcfour"))
