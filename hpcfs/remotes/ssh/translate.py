"""Translates what asyncssh and the network raise while a connection is made into sentences of our
own.

One table, used by nothing else than the login and its first steps: after them, errors belong to
SFTP (sftp/translate.py).
"""

from __future__ import annotations

import socket

import asyncssh

from hpcfs.model.errors import (
    AccessRefused,
    HostKeyRefused,
    NoService,
    RemoteError,
    RemoteFailure,
    Unreachable,
    WrongSettings,
)
from hpcfs.remotes.ssh.settings import Hop
from hpcfs.system.text import one_line

SHOWN_LETTERS = 150


def quoted(text: bytes | str) -> str:
    """Return what somebody there said, on one line; empty where there is nothing to show."""
    said = text if isinstance(text, str) else text.decode(errors="replace")
    words = one_line(said)
    return f"'{words[:SHOWN_LETTERS]}'" if words else ""


def no_service(shown: str, how: str, said: bytes | str) -> NoService:
    """The server lets us in and ends what should be SFTP: `how`, and what it said meanwhile.
    OpenSSH's does not tell what a subsystem writes to stderr."""
    words = ", ".join(filter(None, (how, f"it says {quoted(said)}" if quoted(said) else "")))
    alias = shown.split(" ")[0]
    return NoService(
        f"{shown} lets us in, but ends its SFTP service at once{f' ({words})' if words else ''}: "
        f"see what `ssh {alias} true` says, and ask the site whether this account may use SFTP"
    )


def login_error(
    error: Exception,
    hop: Hop,
    *,
    nobody_to_ask: bool = False,
    authenticating: bool = False,
    banner: str = "",
) -> RemoteError:
    """The error to raise when the connection to `hop` could not be made.

    A server that says goodbye while we authenticate ("Too many authentication failures") has
    refused us: trying again on our own would be what sites ban addresses for. So has, as far as we
    can know, one that ends the connection then without a word, as sshd does with an account that
    has expired, or is not let in (PAM); the `banner` may say why.
    """
    where = f"{hop.shown} port {hop.port}"
    if isinstance(error, asyncssh.PermissionDenied):
        return AccessRefused(_refusal(hop, nobody_to_ask))
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return HostKeyRefused(f"the host key of {where} is not acceptable: {error.reason}")
    if isinstance(error, asyncssh.KeyExchangeFailed):
        return _no_common_algorithm(error, where)
    if isinstance(error, asyncssh.ChannelOpenError):
        return Unreachable(f"the jump host could not reach {where}: {error.reason}")
    if isinstance(error, asyncssh.ConnectionLost | ConnectionResetError) and authenticating:
        said = f" (it says {quoted(banner)})" if quoted(banner) else ""
        return NoService(
            f"{hop.user}@{hop.host} port {hop.port} ended the connection during the login{said}: "
            f"check that `ssh {hop.alias}` works, then try again"
        )
    if isinstance(error, asyncssh.ConnectionLost):
        return Unreachable(f"{where} ended the connection during the login: {error.reason}")
    if isinstance(error, asyncssh.DisconnectError) and authenticating:
        return AccessRefused(f"{_refusal(hop, nobody_to_ask)} (it says: {error.reason})")
    if isinstance(error, asyncssh.DisconnectError):
        return Unreachable(f"{where} ended the connection during the login: {error.reason}")
    if isinstance(error, socket.gaierror):
        return Unreachable(f"the host name {hop.host} is not known: {error.strerror}")
    if isinstance(error, ConnectionRefusedError):
        return Unreachable(f"nothing answers at {where} (connection refused)")
    if isinstance(error, OSError):
        return Unreachable(f"{where} can't be reached: {error.strerror or error}")
    if isinstance(error, ValueError):
        return WrongSettings(f"the SSH settings for {hop.shown} are not usable: {error}")
    return RemoteFailure(f"the login to {where} failed: {error}")


def _refusal(hop: Hop, nobody_to_ask: bool) -> str:
    login = f"{hop.user}@{hop.host} port {hop.port}"
    if nobody_to_ask and not hop.asks:
        return (
            f"{login} asks for a password, passphrase or second factor and BatchMode of the SSH "
            "configuration forbids to ask: use a key that ssh-agent holds, or take BatchMode out"
        )
    if nobody_to_ask:
        return (
            f"{login} asks for a password, passphrase or second factor and there is no terminal "
            "to ask on: start from a terminal, or use a key that ssh-agent holds"
        )
    return f"{login} refused the login: check that `ssh {hop.alias}` works, then try again"


def _no_common_algorithm(error: asyncssh.KeyExchangeFailed, where: str) -> RemoteError:
    if "host key" in error.reason:
        return HostKeyRefused(
            f"{where} no longer offers a host key of the type that known_hosts has: if the site "
            "confirms its new key, remove the old one with ssh-keygen -R and try again"
        )
    return WrongSettings(f"{where} and this program have no algorithm in common: {error.reason}")
