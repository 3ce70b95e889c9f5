"""`hpcfs init`: writes a commented configuration that offers the known hosts and remotes.

config.py parses the text before it is written: a template that the program itself refuses would be
worse than none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from hpcfs.cli.output import complain
from hpcfs.config import config, rclone_conf, ssh_config, urls
from hpcfs.config.rclone_conf import RcloneRemote
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import S3Site, SshSite
from hpcfs.system import ownership, paths
from hpcfs.system.text import printable
from hpcfs.tunnel import file as rendezvous

_HEAD = """\
# hpcfs configuration; docs/configuration.md tells all keys. 'hpcfs check' finds mistakes.

mountpoint = "~/cluster"
# cache_dir = "~/.cache/hpcfs"   # on a local disk; chosen for you if your home is on a network
# cache_size = "20 GiB"
# cache_min_free = "5%"          # or a size: so much of its disk the cache leaves free
# journal_size = "10 GiB"        # so much may wait to be uploaded; then writers wait, too
"""

_EXAMPLES = """
# A cluster, by SSH. Logs in as ssh does: keys, agent, or it asks.
#
# [namespaces.home]
# type = "sftp"
# host = "login3"               # an alias of ~/.ssh/config, or user@host
# path = "~"
# read_only = false
# write = "through"             # "back": closing a file waits for the local disk only
# symlinks = "contain"          # "follow": the server's links may lead anywhere on this machine
# verify = false                # true: compare a hash with the remote's after each upload

# A bucket. Credentials come from the AWS chain (environment, ~/.aws, SSO, instance).
#
# [namespaces.data]
# type = "s3"
# bucket = "training-data"
# prefix = ""
# endpoint_url = "https://storage.example.org"   # AWS without it
# region = "eu-north1"
# profile = "default"

# Your laptop, on which 'hpcfs tunnel HOST --name my-laptop --share ~/data' runs.
#
# [namespaces.laptop]
# type = "tunnel"
# tunnel = "my-laptop"
"""


@dataclass(frozen=True, slots=True)
class Offer:
    """A namespace that the user could include. A complete one needs no further values from the
    user."""

    name: str
    origin: str
    lines: list[str]
    is_complete: bool = True

    def table(self, *, commented: bool) -> str:
        """Return the namespace's table as text."""
        mark = "# " if commented else ""
        rows = [f"[namespaces.{self.name}]", *self.lines]
        return f"\n# from {self.origin}\n" + "".join(f"{mark}{row}\n" for row in rows)


@click.command(short_help="Write a commented configuration.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--force", is_flag=True, help="Replace a configuration that is there.")
def init(config_file: Path | None, force: bool) -> None:
    """Write a commented configuration, offering hosts of ~/.ssh/config, tunnels that lead here, and
    rclone's remotes."""
    file = config_file or paths.config_file()
    if os.path.lexists(file) and not force:
        raise SetupError(f"{file} is already there: edit it, or replace it with --force")
    offers = _offers()
    chosen = _ask(offers) if os.isatty(0) and os.isatty(1) else []
    text = compose(offers, chosen)
    config.parse(text, file, needs_namespaces=False)
    _write(file, text)
    print(printable(f"wrote {file}"))
    if not chosen:
        print("take the '#' from the namespaces that you want, then: hpcfs check; hpcfs mount")


def compose(offers: Sequence[Offer], chosen: Sequence[Offer]) -> str:
    """Return the configuration's text; offers that are not chosen are commented out."""
    tables = [offer.table(commented=offer not in chosen) for offer in offers]
    return _HEAD + "".join(tables) + _EXAMPLES


def _offers() -> list[Offer]:
    offers = [
        Offer(_name(alias), "~/.ssh/config", ['type = "sftp"', f"host = {_quoted(alias)}"])
        for alias in ssh_config.aliases()
        if not re.search(r"[\s/:@]|^-", alias)
    ]
    return _unique([*offers, *_tunnel_offers(), *_rclone_offers()])


def _tunnel_offers() -> Iterator[Offer]:
    for name in rendezvous.names(urls.tunnel_directory()):
        lines = ['type = "tunnel"', f"tunnel = {_quoted(name)}"]
        yield Offer(_name(name), f"the tunnel {name}", lines)


def _rclone_offers() -> Iterator[Offer]:
    try:
        remotes = rclone_conf.load()
    except SetupError as error:
        complain(f"rclone's remotes are not offered: {error}")
        return
    for remote in remotes.values():
        if remote.kind in rclone_conf.SUPPORTED:
            try:
                yield _rclone_offer(remote)
            except SetupError as error:
                complain(f"not offered: {error}")


def _rclone_offer(remote: RcloneRemote) -> Offer:
    """Return the offer for an rclone remote. Raises SetupError where the remote is invalid."""
    site = remote.site(config.DEFAULT_CONNECT_TIMEOUT)
    origin = f"the rclone remote {remote.name!r}"
    if isinstance(site, SshSite):
        values: dict[str, str | int | None] = {"host": site.host, "user": site.user}
        values |= {"port": site.port, "identity_file": site.identity_file}
        return Offer(_name(remote.name), origin, ['type = "sftp"', *_rows(values)])
    assert isinstance(site, S3Site)
    values = {"endpoint_url": site.endpoint_url, "region": site.region, "profile": site.profile}
    lines = ['type = "s3"', 'bucket = "NAME-OF-THE-BUCKET"', *_rows(values)]
    if site.access_key:
        lines.append("# its keys stay in rclone.conf: put them into ~/.aws/credentials, or mount")
        lines.append(f"# {remote.name}:BUCKET by that name on the command line")
    return Offer(_name(remote.name), origin, lines, is_complete=False)


def _rows(values: dict[str, str | int | None]) -> list[str]:
    return [
        f"{key} = {_quoted(value) if isinstance(value, str) else value}"
        for key, value in values.items()
        if value is not None
    ]


def _unique(offers: Sequence[Offer]) -> list[Offer]:
    """Append a number to names that are taken."""
    taken: dict[str, Offer] = {}
    for offer in offers:
        name, number = offer.name, 2
        while name in taken:
            name, number = f"{offer.name}-{number}", number + 1
        taken[name] = Offer(name, offer.origin, offer.lines, offer.is_complete)
    return [
        Offer(_as_key(name), offer.origin, offer.lines, offer.is_complete)
        for name, offer in taken.items()
    ]


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:64].strip(".") or "remote"


def _as_key(name: str) -> str:
    """Quote a name with a dot, which would begin another table."""
    return f'"{name}"' if "." in name else name


def _quoted(text: str) -> str:
    """Return a TOML basic string. JSON's escapes are valid in TOML."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _ask(offers: Sequence[Offer]) -> list[Offer]:
    complete = [offer for offer in offers if offer.is_complete]
    chosen = []
    for offer in complete:
        question = printable(f"Include {offer.name} (from {offer.origin})?")
        if click.confirm(question, default=True):
            chosen.append(offer)
    return chosen


def _write(file: Path, text: str) -> None:
    """Write the file atomically."""
    ownership.make_directories(file.parent)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
