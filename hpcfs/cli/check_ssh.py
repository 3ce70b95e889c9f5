"""What would stop an SSH namespace, found without logging in: a failed login can cost the user's
address a ban, and a second factor must not be asked for by a check."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcfs.cli.findings import Finding
from hpcfs.system import paths
from hpcfs.transfer.messages import SshSite

BANNER_BYTES = 255


@dataclass(frozen=True, slots=True)
class Resolved:
    """What ~/.ssh/config makes of a host. `jump` is a ProxyJump or ProxyCommand, or empty."""

    host: str
    port: int
    jump: str
    known_hosts: list[Path]
    identity_files: list[Path]


def ssh_namespace(subject: str, site: SshSite) -> Iterator[Finding]:
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
    found = resolve(site)
    if found.jump:
        yield Finding("ok", subject, f"{found.host} is reached through {found.jump}: not tried")
    else:
        yield _reach(subject, found, site.connect_timeout)
    yield _known(subject, found)
    yield _keys(subject, found)


def resolve(site: SshSite) -> Resolved:
    """Asks `ssh -G`; without an ssh the defaults must do."""
    options: dict[str, list[str]] = {}
    for line in _ssh_g(site).splitlines():
        key, _, value = line.partition(" ")
        options.setdefault(key, []).append(value)
    jumps = [
        v for key in ("proxyjump", "proxycommand") for v in options.get(key, []) if v != "none"
    ]
    known = (options.get("userknownhostsfile") or ["~/.ssh/known_hosts"])[0].split()
    known += (options.get("globalknownhostsfile") or ["/etc/ssh/ssh_known_hosts"])[0].split()
    default_keys = [f"~/.ssh/id_{kind}" for kind in ("ed25519", "ecdsa", "rsa")]
    keys = [site.identity_file] if site.identity_file else options.get("identityfile", default_keys)
    return Resolved(
        host=(options.get("hostname") or [site.host])[0],
        port=site.port or int((options.get("port") or ["22"])[0]),
        jump=jumps[0] if jumps else "",
        known_hosts=[_home_path(name) for name in known],
        identity_files=[_home_path(name) for name in keys],
    )


def _ssh_g(site: SshSite) -> str:
    if not shutil.which("ssh"):
        return ""
    command = ["ssh", "-G"]
    if site.ssh_config:
        command += ["-F", site.ssh_config]
    if site.user:
        command += ["-l", site.user]
    result = subprocess.run(
        [*command, "--", site.host],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=10,
        check=False,
    )
    return result.stdout


def _reach(subject: str, found: Resolved, timeout: float) -> Finding:
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


def _known(subject: str, found: Resolved) -> Finding:
    from asyncssh import read_known_hosts

    files = [str(file) for file in found.known_hosts if os.access(file, os.R_OK)]
    try:
        keys = read_known_hosts(files).match(found.host, "", found.port) if files else ()
    except ValueError as error:
        return Finding("fail", subject, f"known_hosts can't be read ({error}): correct that line")
    if any(keys):
        return Finding("ok", subject, f"the host key of {found.host} is known")
    return Finding(
        "warn",
        subject,
        f"the host key of {found.host} is not known: the first mount asks on a terminal "
        "and fails without one",
    )


def _keys(subject: str, found: Resolved) -> Finding:
    names = [file.name for file in found.identity_files if os.access(file, os.R_OK)]
    agent = _agent_answers()
    if agent:
        names.append("an agent")
    if names:
        return Finding("ok", subject, f"logs in with {', '.join(names)}")
    return Finding(
        "warn",
        subject,
        "no key file and no agent: the mount must ask for a password on a terminal "
        "(ssh-keygen and ssh-copy-id set up a key)",
    )


def _agent_answers() -> bool:
    path = os.environ.get("SSH_AUTH_SOCK")
    if not path:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(2.0)
        try:
            connection.connect(path)
        except OSError:  # a left-over variable: no agent
            return False
    return True


def _home_path(name: str) -> Path:
    return paths.home() / name[2:] if name.startswith("~/") else Path(name)
