"""Checks an SSH namespace without logging in.

A failed login can get the user's address banned, and a check must not ask for a second factor.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hpcfs.cli.findings import Finding
from hpcfs.model.errors import RemoteError
from hpcfs.model.sites import SshSite

if TYPE_CHECKING:
    from hpcfs.remotes.ssh.settings import Hop

BANNER_BYTES = 255


def ssh_namespace(subject: str, site: SshSite) -> Iterator[Finding]:
    """Check the namespace."""
    for setting, file in (("ssh_config", site.ssh_config), ("identity_file", site.identity_file)):
        if file and not os.access(file, os.R_OK):
            yield Finding("fail", subject, f"{setting} {file} can't be read: correct its path")
            return
    if site.transport == "openssh" and not shutil.which("ssh"):
        yield Finding(
            "fail",
            subject,
            'transport = "openssh" needs the program ssh, which is not there: '
            "install it (openssh-client), or leave the key out",
        )
        return
    from hpcfs.remotes.ssh import checking  # the other checks need no asyncssh

    try:
        *jumps, found = checking.look(site)
    except RemoteError as error:
        yield Finding("fail", subject, error.message)
        return
    yield _login(subject, jumps, found)
    for sentence in found.not_obeyed if site.transport == "asyncssh" else ():
        yield Finding("warn", subject, f"in the SSH configuration {sentence}")
    if found.is_direct:
        yield _reach(subject, found, site.connect_timeout)
    for hop in (*jumps, found):
        yield _known(subject, hop)
    yield _keys(subject, found)


def _login(subject: str, jumps: Sequence[Hop], found: Hop) -> Finding:
    """Report how ssh resolves the host's name."""
    way = [f"{hop.user}@{hop.host} port {hop.port}" for hop in jumps]
    if found.proxy_command is not None:
        way = [f"'{found.proxy_command}'"]
    through = f", through {', then '.join(way)}, which is not tried" if way else ""
    login = f"{found.user}@{found.host} port {found.port}"
    return Finding("ok", subject, f"{found.alias} means {login}{through}")


def _reach(subject: str, found: Hop, timeout: float) -> Finding:
    where = f"{found.host} port {found.port}"
    try:
        with socket.create_connection((found.host, found.port), timeout) as connection:
            connection.settimeout(timeout)
            greeting = connection.recv(BANNER_BYTES)
    except socket.gaierror:
        return Finding(
            "fail", subject, f"{found.host} has no address: correct host, or connect to its network"
        )
    except OSError as error:
        reason = error.strerror or "no answer in time"
        return Finding("fail", subject, f"{where}: {reason}: is the network (or VPN) up?")
    if not greeting.startswith(b"SSH-2.0-"):
        return Finding("fail", subject, f"{where} is no SSH server: correct host and port")
    return Finding("ok", subject, f"{where} answers")


def _known(subject: str, found: Hop) -> Finding:
    name, strict = found.host_keys.rules.name, found.host_keys.rules.strict
    if found.host_keys.knows_host():
        return Finding("ok", subject, f"the host key of {name} is known")
    if strict == "yes":
        return Finding(
            "fail",
            subject,
            f"the host key of {name} is not known, and StrictHostKeyChecking is yes: add what "
            "ssh-keyscan prints to known_hosts after checking it",
        )
    if strict in ("no", "accept-new"):
        text = f"the host key of {name} is not known: StrictHostKeyChecking {strict} accepts any"
        return Finding("warn", subject, text)
    return Finding(
        "warn",
        subject,
        f"the host key of {name} is not known: the first mount asks on a terminal "
        "and fails without one",
    )


def _keys(subject: str, found: Hop) -> Finding:
    names = [file.name for file in found.identities.key_files]
    if _agent_answers(found.identities.agent):
        names.append("an agent")
    if names:
        return Finding("ok", subject, f"logs in with {', '.join(names)}")
    return Finding(
        "warn",
        subject,
        "no key file and no agent: the mount must ask for a password on a terminal "
        "(ssh-keygen and ssh-copy-id set up a key)",
    )


def _agent_answers(path: str) -> bool:
    if not path:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(2.0)
        try:
            connection.connect(path)
        except OSError:  # a left-over variable: no agent
            return False
    return True
