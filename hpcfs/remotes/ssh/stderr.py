"""Turns what a child `ssh` wrote before it ended into sentences of our own: the only such table.

Its exit code is 255 for everything that it could not do itself; its words decide then. The last of
them is in the sentence.
"""

from __future__ import annotations

import re

from hpcfs.model.errors import (
    AccessRefused,
    HostKeyRefused,
    LoginNeeded,
    NoService,
    NotConnected,
    RemoteError,
    Unreachable,
    WrongSettings,
)
from hpcfs.remotes.ssh.askpass_server import is_decision
from hpcfs.remotes.ssh.openssh import OpenSshTarget
from hpcfs.remotes.ssh.translate import no_service

_HOST_KEY = re.compile(
    r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED|host key is known for"
)
_REFUSED = re.compile(r"Permission denied \(|Too many authentication failures")
_NO_SFTP = re.compile(r"subsystem request failed")
_UNREACHED = re.compile(r"^ssh: (connect to host|Could not resolve hostname) ", re.MULTILINE)
_WRONG = re.compile(r"[Bb]ad configuration option|[Uu]nable to negotiate|ssh_askpass: exec")
SSH_FAILED = 255
"""The exit code of ssh(1) for its own failures; others are those of what ran on the server."""


def ending(
    target: OpenSshTarget,
    lines: list[str],
    unanswered: str | None,
    code: int | None = None,
    *,
    answered: bool = False,
) -> RemoteError:
    """The error to raise when ssh ended before SFTP began, with that exit code if it is known.
    `answered` says that the user had typed something."""
    if unanswered is not None:
        return _nobody(target, unanswered)
    words = "\n".join(lines)
    said = lines[-1] if lines else "it gives no reason"
    alias = target.site.host
    if code is not None and 0 <= code < SSH_FAILED:
        return no_service(target.shown, f"exit code {code}", words)
    if _HOST_KEY.search(words):
        return HostKeyRefused(
            f"the host key of {target.shown} is not one that ssh trusts ({said}): "
            f"connect once with 'ssh {alias}', which says why and what to do, then run "
            "'hpcfs login'"
        )
    if _REFUSED.search(words):
        kind = LoginNeeded if answered else AccessRefused
        return kind(
            f"{target.shown} refused the login ({said}): "
            f"check that 'ssh {alias}' works, then run 'hpcfs login'"
        )
    if _NO_SFTP.search(words):
        return NoService(
            f"{target.shown} lets us in but has no SFTP service ({said}): ask the site to enable "
            "the sftp subsystem of its SSH server"
        )
    if _WRONG.search(words):
        return WrongSettings(f"ssh can't reach {target.shown} with these settings: {said}")
    kind_of_loss = NotConnected if _UNREACHED.search(words) else Unreachable
    return kind_of_loss(f"ssh does not reach {target.shown}: {said}")


def _nobody(target: OpenSshTarget, question: str) -> RemoteError:
    alias = target.site.host
    if is_decision(question):
        return HostKeyRefused(
            f"the host key of {target.shown} is unknown and there is no terminal to ask on: "
            "run 'hpcfs login' on one, and compare its fingerprint"
        )
    return LoginNeeded(
        f"{target.shown} asks for a password, passphrase or second factor and there is no "
        f"terminal to ask on: run 'hpcfs login' on one, or log in before with 'ssh -MNf {alias}' "
        "and a ControlPath in ~/.ssh/config"
    )
