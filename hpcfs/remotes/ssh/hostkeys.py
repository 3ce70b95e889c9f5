"""Which host keys are trusted: known_hosts files read, asked about and added to, as ssh does it.

Owns the only trust decision for SSH. A key that known_hosts has is trusted; a host that it does not
name is shown to the user, whose "yes" is written down; a host that it names with another key is
refused, whatever the user says. Refused too is what asyncssh would do by default: to trust every
key when `UserKnownHostsFile none` is set, and to trust a key because it is known for the address
that the name resolves to now.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncssh

from hpcfs.remotes.base import Prompter
from hpcfs.transfer.messages import HostKeyRefused

log = logging.getLogger(__name__)

DEFAULT_USER_FILES = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
DEFAULT_GLOBAL_FILES = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
DEFAULT_PORT = 22
QUESTIONS = 3

TrustedKeys = tuple[Sequence[asyncssh.SSHKey], Sequence[asyncssh.SSHKey], Sequence[asyncssh.SSHKey]]


@dataclass(frozen=True)
class PresentedKey:
    """The key that a server showed and that nothing vouches for yet."""

    host: str
    port: int
    key: asyncssh.SSHKey

    @property
    def pattern(self) -> str:
        """The host as known_hosts spells it."""
        return self.host if self.port == DEFAULT_PORT else f"[{self.host}]:{self.port}"

    @property
    def kind(self) -> str:
        return self.key.get_algorithm().removeprefix("ssh-").upper()

    @property
    def fingerprint(self) -> str:
        return self.key.get_fingerprint()


class HostKeys:
    """The known_hosts files of one login; new keys go to the first of the user's."""

    def __init__(self, user_files: Sequence[str] | None, global_files: Sequence[str] | None):
        """None stands for ssh's defaults; an empty sequence for no file at all."""
        users = DEFAULT_USER_FILES if user_files is None else user_files
        globals_ = DEFAULT_GLOBAL_FILES if global_files is None else global_files
        self._user_files = [Path(name).expanduser() for name in users]
        self._files = [*self._user_files, *(Path(name).expanduser() for name in globals_)]
        self._accepted = asyncssh.SSHKnownHosts()

    def trusted(self, host: str, _address: str, port: int | None) -> TrustedKeys:
        """asyncssh's callback: host keys, certificate authorities, revoked keys of this host."""
        keys: list[asyncssh.SSHKey] = []
        authorities: list[asyncssh.SSHKey] = []
        revoked: list[asyncssh.SSHKey] = []
        for known in [self._accepted, *(_read(path) for path in self._files)]:
            found = known.match(host, "", port)
            keys += found[0]
            authorities += found[1]
            revoked += found[2]
        return keys, authorities, revoked

    async def decide(self, presented: PresentedKey, prompter: Prompter) -> None:
        """Returns when the user trusts the key from now on; raises HostKeyRefused otherwise."""
        self._refuse_changed(presented)
        if not await _user_trusts(presented, prompter):
            raise HostKeyRefused(
                f"the host key of {presented.pattern} was not accepted, so nothing was sent there"
            )
        self._remember(presented)

    def _refuse_changed(self, presented: PresentedKey) -> None:
        for path in self._files:
            if _read(path).match(presented.pattern, "", None)[0]:
                raise HostKeyRefused(
                    f"the host key of {presented.pattern} is not the one in {path} (it is now "
                    f"{presented.kind} {presented.fingerprint}): someone may be intercepting the "
                    "connection; if the site confirms the new key, run "
                    f"ssh-keygen -R '{presented.pattern}' -f {path} and try again"
                )

    def _remember(self, presented: PresentedKey) -> None:
        line = f"{presented.pattern} {presented.key.export_public_key().decode().strip()}\n"
        self._accepted.load(line)
        if not self._user_files:
            return
        path = self._user_files[0]
        try:
            _append(path, line)
        except OSError as error:
            log.warning("%s could not be written, so the key is not kept: %s", path, error)


async def _user_trusts(presented: PresentedKey, prompter: Prompter) -> bool:
    text = (
        f"The host {presented.pattern} is not known yet.\n"
        f"Its {presented.kind} key has the fingerprint {presented.fingerprint}\n"
        "Trust this key and connect (yes/no)? "
    )
    for _ in range(QUESTIONS):
        answer = await prompter.ask(text, echo=True)
        if answer is None:
            raise HostKeyRefused(
                f"the host key of {presented.pattern} is unknown ({presented.kind} "
                f"{presented.fingerprint}) and there is no terminal to ask on: connect once with "
                "ssh, or add what ssh-keyscan prints to known_hosts after checking it"
            )
        if answer.strip().lower() in ("yes", "no"):
            return answer.strip().lower() == "yes"
        text = "Please type yes or no: "
    return False


def _read(path: Path) -> asyncssh.SSHKnownHosts:
    """A file's entries. A line that makes no sense is passed over, as ssh does, not all of it."""
    known = asyncssh.SSHKnownHosts()
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return known
    except OSError as error:
        log.warning("%s could not be read: %s", path, error)
        return known
    for number, line in enumerate(text.splitlines(), 1):
        try:
            known.load(line)
        except ValueError as error:
            log.warning("%s line %d is not understood: %s", path, number, error)
    return known


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        unfinished = size > 0 and file.read(1) != b"\n"
        file.write(b"\n" * unfinished + line.encode())
