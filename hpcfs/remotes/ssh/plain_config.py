"""Reads an ssh_config where there is no ssh to ask: what is plain is read, the rest is refused by
its line.

Understood are `Host`, `Match all`, `Include`, and options whose values mean the same in every
version. All else would be guessed, and a guess logs in as somebody else, elsewhere, or with less
care than the user asked for. Options of terminals and forwards are passed over.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpcfs.model import ssh_syntax
from hpcfs.model.errors import WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh.tokens import local_user
from hpcfs.system import ownership

MAX_INCLUDE_DEPTH = 16

_ONE_VALUE = (
    "addressfamily batchmode bindaddress casignaturealgorithms checkhostip ciphers fingerprinthash "
    "gssapiauthentication gssapidelegatecredentials gssapikeyexchange hashknownhosts "
    "hostbasedauthentication hostkeyalgorithms hostkeyalias hostname identitiesonly "
    "identityagent kbdinteractiveauthentication kexalgorithms macs "
    "nohostauthenticationforlocalhost numberofpasswordprompts passwordauthentication port "
    "preferredauthentications proxycommand proxyjump proxyusefdpass pubkeyacceptedalgorithms "
    "pubkeyauthentication requiredrsasize stricthostkeychecking tcpkeepalive user"
)
_ONE = frozenset(_ONE_VALUE.split())
_LINES = frozenset(["identityfile", "certificatefile"])
"""Each line adds one."""
_WORDS = frozenset(["globalknownhostsfile", "userknownhostsfile", "revokedhostkeys"])
_FOR_TERMINALS_AND_FORWARDS = (
    "addkeystoagent clearallforwardings compression connectionattempts connecttimeout "
    "controlmaster controlpath controlpersist dynamicforward enableescapecommandline "
    "escapechar exitonforwardfailure forkafterauthentication forwardagent forwardx11 "
    "forwardx11timeout forwardx11trusted gatewayports ipqos kbdinteractivedevices localcommand "
    "localforward loglevel logverbose obscurekeystroketiming permitlocalcommand permitremoteopen "
    "rekeylimit remotecommand remoteforward requesttty sendenv serveralivecountmax "
    "serveraliveinterval sessiontype setenv stdinnull streamlocalbindmask streamlocalbindunlink "
    "syslogfacility tunnel tunneldevice updatehostkeys visualhostkey warnweakcrypto "
    "xauthlocation"
)
_OF_NO_CONCERN = frozenset(_FOR_TERMINALS_AND_FORWARDS.split())
_ALGORITHMS = frozenset(
    ["ciphers", "hostkeyalgorithms", "kexalgorithms", "macs", "pubkeyacceptedalgorithms"]
)


def read(site: SshSite, files: Sequence[str]) -> dict[str, list[str]]:
    """The options of `site`, as `ssh -G` names them. Raises WrongSettings."""
    reader = _ConfigReader(site.host)
    if site.user is not None:
        reader.options["user"] = [site.user]
    if site.port is not None:
        reader.options["port"] = [str(site.port)]
    for name in files:
        reader.file(Path(name), is_active=True, depth=0)
    found = reader.options
    host = found.get("hostname", ["%h"])[0]
    found["hostname"] = [host.replace("%h", site.host).replace("%%", "%").lower()]
    found.setdefault("user", [local_user()])
    found.setdefault("port", ["22"])
    return found


@dataclass
class _ConfigReader:
    host: str
    options: dict[str, list[str]] = field(default_factory=dict)
    _place: str = ""

    def file(self, path: Path, *, is_active: bool, depth: int) -> None:
        """A `Host` of an included file ends with the file, as ssh has it."""
        if depth > MAX_INCLUDE_DEPTH:
            raise WrongSettings(f"{path}: files that include each other too deep")
        outer = is_active
        for self._place, words in _lines(path):
            keyword, *arguments = words
            if keyword == "host":
                is_active = outer and self._matches(arguments)
            elif keyword == "match":
                is_active = outer and self._is_all(arguments)
            elif keyword == "include":
                for pattern in arguments:
                    for name in sorted(glob.glob(_included(pattern, path))):
                        self.file(Path(name), is_active=is_active, depth=depth + 1)
            else:
                self._option(keyword, arguments, is_active=is_active)

    def _matches(self, patterns: Sequence[str]) -> bool:
        found = False
        for pattern in patterns:
            if fnmatch.fnmatchcase(self.host, _glob(pattern.removeprefix("!"))):
                if pattern.startswith("!"):
                    return False
                found = True
        return found

    def _is_all(self, arguments: Sequence[str]) -> bool:
        if [word.lower() for word in arguments] != ["all"]:
            self._refuse("Match")
        return True

    def _option(self, keyword: str, arguments: Sequence[str], *, is_active: bool) -> None:
        if keyword in _OF_NO_CONCERN or not is_active:
            return
        if keyword not in _ONE | _LINES | _WORDS or not arguments:
            self._refuse(keyword)
        if keyword == "proxycommand":
            arguments = [" ".join(arguments)]
        if keyword in _ALGORITHMS and arguments[0][:1] in "+-^":
            self._refuse(f"{keyword} with {arguments[0][0]}")
        if keyword == "port" and not arguments[0].isdecimal():
            raise WrongSettings(f"{self._place}: {arguments[0]!r} is no port")
        if keyword == "hostname" and "%" in arguments[0].replace("%h", "").replace("%%", ""):
            self._refuse(f"the token in {arguments[0]}")
        if keyword in _WORDS | {"identityagent"} and re.search(r"%|\$\{", " ".join(arguments)):
            self._refuse(f"the token in {' '.join(arguments)}")
        if keyword == "user" and ("%" in arguments[0] or "$" in arguments[0]):
            self._refuse(f"the token in {arguments[0]}")  # which versions of ssh expand it differs
        if keyword in _LINES:
            self.options.setdefault(keyword, []).append(arguments[0])
        elif keyword not in self.options:
            self.options[keyword] = [" ".join(arguments) if keyword in _WORDS else arguments[0]]

    def _refuse(self, what: str) -> None:
        raise WrongSettings(
            f"{self._place}: {what} is not understood without the program ssh: install it "
            "(openssh-client), or name a plainer file with ssh_config"
        )


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    try:
        with path.open(errors="surrogateescape") as file:
            check_owner(path, os.fstat(file.fileno()))
            text = file.read()
    except FileNotFoundError:
        return
    except OSError as error:
        raise WrongSettings(f"{path} can't be read: {error.strerror}") from None
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{path} line {number}"
        try:
            words = ssh_syntax.split(line)
        except ssh_syntax.BadQuotes as error:
            raise WrongSettings(f"{place}: {error}") from None
        if words and words[0] == "proxycommand":
            words = ["proxycommand", *_raw(line)]
        if words:
            yield place, words


def check_owner(path: Path, found: os.stat_result) -> None:
    """Check who may write to a configuration, as ssh looks at ~/.ssh/config; that an ssh of one's
    own could be named with -F, and is not looked at then, makes a ProxyCommand of somebody else's
    no safer. Raises WrongSettings."""
    if reason := ownership.untrusted_reason(found):
        raise WrongSettings(
            f"{path} may be somebody else's word ({reason}), and an SSH configuration runs "
            "commands: make a copy of your own that only you can write to"
        )


def _raw(line: str) -> list[str]:
    """Return a command: the rest of its line, quotes and all."""
    rest = line.strip()[len("proxycommand") :].lstrip(" \t").removeprefix("=").strip()
    return [rest] if rest else []


def _glob(pattern: str) -> str:
    """ssh's patterns know * and ? only."""
    return pattern.replace("[", "[[]")


def _included(pattern: str, file: Path) -> str:
    """Return the files of an Include. A relative one is below ~/.ssh, or /etc/ssh in the system's
    file."""
    base = "/etc/ssh" if str(file).startswith("/etc/ssh/") else os.path.expanduser("~/.ssh")
    return os.path.join(base, os.path.expanduser(pattern))
