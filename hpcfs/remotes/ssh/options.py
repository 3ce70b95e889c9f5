"""Reads the options of a host as ssh itself understands them: the answer of `ssh -G HOST`.

ssh_config has quoting, tokens, `Match exec`, includes and a second pass, and a file that is read
nearly as ssh reads it logs in as somebody else. So wherever there is an `ssh` it decides. Where
there is none, `plain_config.py` reads what it fully understands and refuses the rest.

An option's name is in lower case, as `ssh -G` writes it.
"""

from __future__ import annotations

import os
import pwd
import shutil
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hpcfs.model.errors import Unreachable, WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.ssh import plain_config, program
from hpcfs.system.text import one_line

SYSTEM_FILE = "/etc/ssh/ssh_config"
_HASH = "/%C"
"""As ControlPath, which a connection of ours does not use: of all tokens only %C can't be told from
the outside, since what it is a hash of differs between versions of ssh."""
_DEFAULTS_SECONDS = 10.0


@dataclass(frozen=True)
class SshOptions:
    """The options of one host. `defaults` are those of an ssh without any configuration."""

    options: Mapping[str, Sequence[str]]
    defaults: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)

    def one(self, option: str) -> str | None:
        """Return its value; None where it has none, or "none"."""
        value = next(iter(self.options.get(option, ())), "none")
        return None if value.lower() == "none" else value

    def all(self, option: str) -> list[str]:
        """Return all values of an option, in order."""
        return list(self.options.get(option, ()))

    def is_on(self, option: str) -> bool:
        """Return whether an option is "yes"."""
        return (self.one(option) or "").lower() in ("yes", "true")

    def is_chosen(self, option: str) -> bool:
        """Return whether a configuration says something else than ssh would do by itself."""
        return option in self.options and self.all(option) != list(self.defaults.get(option, ()))

    def names(self, option: str) -> list[str]:
        """Return the algorithms that an option names, in order."""
        return [name for name in (self.one(option) or "").split(",") if name]

    def files(self, option: str) -> list[str] | None:
        """Return the files of an option that takes several in one line, of which `ssh -G` does not
        show the quotes: a word that begins no path belongs to the one before. None where the line
        is not there."""
        values = self.options.get(option)
        if values is None:
            return None
        found: list[str] = []
        for word in " ".join(values).split(" "):
            if found and not word.startswith(("/", "~", "$", "%")):
                found[-1] += f" {word}"
            else:
                found.append(word)
        return [] if [name.lower() for name in found] == ["none"] else found


async def read(site: SshSite) -> SshOptions:
    """Read the options of a site. Raises WrongSettings when the configuration can't be read or
    understood, and Unreachable when that takes longer than the site's connect_timeout (a `Match
    exec` may wait for something)."""
    _must_be_readable(site.ssh_config)
    ssh = shutil.which("ssh")
    if ssh is None or home_of_ssh() is None:
        return SshOptions(plain_config.read(site, _files(site)))
    with _chosen_files(site) as (where, given):
        line = [ssh, "-G", "-T", *where, "-o", f"ControlPath={_HASH}", "-o", "RemoteCommand=none"]
        line += ["-l", site.user] if site.user is not None else []
        line += ["-p", str(site.port)] if site.port is not None else []
        answer = await ask_ssh([*line, "-s", "--", site.host, "sftp"], site, given)
    return SshOptions(parse(answer).options, await _defaults(ssh))


def parse(answer: str) -> SshOptions:
    """Parse the lines of `ssh -G`."""
    options: dict[str, list[str]] = {}
    for line in answer.splitlines():
        option, _, value = line.partition(" ")
        options.setdefault(option.lower(), []).append(value)
    return SshOptions(options)


async def ask_ssh(line: list[str], site: SshSite, given: int = DEVNULL) -> str:
    """Return the answer of `ssh -G`. Raises WrongSettings with ssh's own words when there is
    none."""
    try:
        code, answer, complaint = await program.ask(line, site.connect_timeout, given)
    except TimeoutError:
        raise Unreachable(
            f"'ssh -G {site.host}' did not answer within {site.connect_timeout:g} s: does a "
            "'Match exec' of the SSH configuration wait for something?"
        ) from None
    except OSError as error:
        raise no_ssh(error) from error
    if code != 0:
        reason = _reason(complaint.decode(errors="replace"))
        raise WrongSettings(f"the SSH configuration for {site.host} is not usable: {reason}")
    return answer.decode(errors="surrogateescape")


def no_ssh(error: OSError) -> WrongSettings:
    """Return the error for an ssh that can't be started."""
    return WrongSettings(
        f'transport = "openssh" needs the program ssh, which can\'t be started '
        f"({error.strerror}): install it (openssh-client), or leave the key out"
    )


def _reason(complaint: str) -> str:
    """Return what is wrong: the first line says it, with file and line; the last only that ssh
    ends."""
    lines = [one_line(line) for line in complaint.splitlines() if line.strip()]
    shown = [line for line in lines if "terminating, " not in line] or lines
    text = "; ".join(shown[:3]) or "ssh says nothing"
    return text.replace("/dev/stdin", "~/.ssh/config")


def _must_be_readable(name: str | None) -> None:
    if name is None:
        return
    file = Path(name).expanduser()
    try:
        with file.open("rb") as opened:
            plain_config.check_owner(file, os.fstat(opened.fileno()))
    except OSError as error:
        raise WrongSettings(f"{file} can't be read: {error.strerror}") from None


def home_of_ssh() -> str | None:
    """Return the home directory by the user database, which is what ssh asks, whatever HOME says;
    the rest of hpcfs goes by HOME. None where the database does not have this user, as in some
    containers: then no ssh works."""
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return None


def at_home(path: Path) -> Path:
    """Return a path in ssh's own home as one in HOME, where that is another directory, unless only
    the first is there."""
    home = home_of_ssh()
    if home is None or not is_moved() or not path.is_relative_to(home):
        return path
    moved = Path("~").expanduser() / path.relative_to(home)
    return moved if moved.exists() or not path.exists() else path


def is_moved() -> bool:
    """Return whether HOME is another directory than ssh's."""
    return os.path.realpath(Path("~").expanduser()) != os.path.realpath(home_of_ssh() or "~")


def _files(site: SshSite) -> list[str]:
    """The configuration's files in their order: of several values the first counts."""
    if site.ssh_config is not None:
        return [str(Path(site.ssh_config).expanduser())]
    return [str(Path("~/.ssh/config").expanduser()), SYSTEM_FILE]


@contextmanager
def _chosen_files(site: SshSite) -> Iterator[tuple[list[str], int]]:
    """The words that tell ssh its files, and its stdin. It finds them itself, but for a HOME that
    it does not go by: then a file that includes both."""
    if site.ssh_config is not None:
        yield ["-F", *_files(site)], DEVNULL
    elif not is_moved():
        yield [], DEVNULL
    else:
        text = "".join(f"Match all\nInclude {_quoted(name)}\n" for name in _files(site))
        with os.fdopen(os.memfd_create("ssh_config"), "w+b") as file:
            file.write(text.encode(errors="surrogateescape"))
            file.flush()
            yield ["-F", "/dev/stdin"], file.fileno()


def _quoted(path: str) -> str:
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


_known_defaults: dict[str, Mapping[str, Sequence[str]]] = {}


async def _defaults(ssh: str) -> Mapping[str, Sequence[str]]:
    """Return the options of this ssh without any file: by them a user's own list of algorithms is
    told from ssh's."""
    if ssh not in _known_defaults:
        site = SshSite("localhost", connect_timeout=_DEFAULTS_SECONDS)
        line = [ssh, "-G", "-T", "-F", "none", "-s", "--", site.host, "sftp"]
        _known_defaults[ssh] = parse(await ask_ssh(line, site)).options
    return _known_defaults[ssh]
