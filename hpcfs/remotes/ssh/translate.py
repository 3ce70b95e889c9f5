"""Translates what asyncssh and the network raise while a connection is made into sentences of our
own.

One table, used by nothing else than the login and its first steps: after them, errors belong to
SFTP (sftp/translate.py).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

import asyncssh

from hpcfs.model.errors import (
    AccessRefused,
    HostKeyRefused,
    LoginEnded,
    LoginNeeded,
    NoService,
    NotConnected,
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


@dataclass(frozen=True)
class LoginProgress:
    """How far a login had come: whether there was a connection, whether the server said anything,
    whether it was asked to let us in, whether a question found nobody to answer it, whether the
    user answered one, and what the server's `banner` said."""

    connected: bool = False
    greeted: bool = False
    authenticating: bool = False
    nobody_to_ask: bool = False
    answered: bool = False
    banner: str = ""


def login_error(
    error: Exception, hop: Hop, progress: LoginProgress = LoginProgress()
) -> RemoteError:
    """The error to raise when the connection to `hop` could not be made.

    A server that says goodbye while we authenticate ("Too many authentication failures") has
    refused us: trying again soon on our own would be what sites ban addresses for. So has, as far
    as we can know, one that ends the connection then without a word, as sshd does with an account
    that has expired, or is not let in (PAM); the `banner` may say why.
    """
    where = f"{hop.shown} port {hop.port}"
    if isinstance(error, asyncssh.PermissionDenied):
        return _refused(hop, progress)
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return HostKeyRefused(f"the host key of {where} is not acceptable: {error.reason}")
    if isinstance(error, asyncssh.KeyExchangeFailed):
        return _no_common_algorithm(error, where)
    if isinstance(error, asyncssh.ChannelOpenError):
        return Unreachable(f"the jump host could not reach {where}: {error.reason}")
    if isinstance(error, asyncssh.ConnectionLost | ConnectionResetError) and (
        progress.authenticating
    ):
        said = f" (it says {quoted(progress.banner)})" if quoted(progress.banner) else ""
        return LoginEnded(
            f"{hop.user}@{hop.host} port {hop.port} ended the connection during the login{said}: "
            f"check that `ssh {hop.alias}` works, then run 'hpcfs login'"
        )
    if isinstance(error, asyncssh.ConnectionLost):
        kind = Unreachable if progress.greeted else NotConnected
        return kind(f"{where} ended the connection during the login: {error.reason}")
    if isinstance(error, asyncssh.DisconnectError) and progress.authenticating:
        return _refused(hop, progress, f" (it says: {error.reason})")
    if isinstance(error, asyncssh.DisconnectError):
        return Unreachable(f"{where} ended the connection during the login: {error.reason}")
    if isinstance(error, socket.gaierror):
        return NotConnected(f"the host name {hop.host} is not known: {error.strerror}")
    if isinstance(error, ConnectionRefusedError):
        return NotConnected(f"nothing answers at {where} (connection refused)")
    if isinstance(error, OSError):
        kind = Unreachable if progress.greeted else NotConnected
        return kind(f"{where} can't be reached: {error.strerror or error}")
    if isinstance(error, ValueError) and progress.connected:
        kind = Unreachable if progress.authenticating else NotConnected
        return kind(f"{where} sent what makes no sense during the login: {error}")
    if isinstance(error, ValueError):
        return WrongSettings(f"the SSH settings for {hop.shown} are not usable: {error}")
    return RemoteFailure(f"the login to {where} failed: {error}")


def _refused(hop: Hop, progress: LoginProgress, said: str = "") -> AccessRefused:
    """Only keys may be offered again by themselves, as nobody has to type them."""
    login = f"{hop.user}@{hop.host} port {hop.port}"
    if progress.nobody_to_ask and not hop.asks:
        return LoginNeeded(
            f"{login} asks for a password, passphrase or second factor and BatchMode of the SSH "
            f"configuration forbids to ask: use a key that ssh-agent holds, or take BatchMode out"
            f"{said}"
        )
    if progress.nobody_to_ask:
        return LoginNeeded(
            f"{login} asks for a password, passphrase or second factor and there is no terminal "
            f"to ask on: run 'hpcfs login' on one, or use a key that ssh-agent holds{said}"
        )
    kind = LoginNeeded if progress.answered else AccessRefused
    return kind(
        f"{login} refused the login: check that `ssh {hop.alias}` works, then run 'hpcfs login'"
        f"{said}"
    )


def _no_common_algorithm(error: asyncssh.KeyExchangeFailed, where: str) -> RemoteError:
    if "host key" in error.reason:
        return HostKeyRefused(
            f"{where} no longer offers a host key of the type that known_hosts has: if the site "
            "confirms its new key, remove the old one with ssh-keygen -R and try again"
        )
    return WrongSettings(f"{where} and this program have no algorithm in common: {error.reason}")
