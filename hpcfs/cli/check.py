"""`hpcfs check`: finds out what would stop a mount, and says how to mend each problem."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from hpcfs.cli import arguments, check_laptop, check_machine, check_s3, check_ssh, check_tunnel
from hpcfs.cli.findings import Finding
from hpcfs.cli.output import count
from hpcfs.cli.tunnel import bind_option, name_option
from hpcfs.config import config
from hpcfs.config.config import Config, NamespaceConfig
from hpcfs.model.errors import SetupError
from hpcfs.model.sites import S3Root, S3Site, SftpRoot, SshSite, TunnelSite
from hpcfs.system.text import printable

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(short_help="Find out what would stop a mount.")
@click.argument("args", nargs=-1, metavar="[HOST | NAME=URL ...]")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE")
@click.option("--tunnel", "tunnel_host", metavar="HOST", help="What 'hpcfs tunnel HOST' needs.")
@name_option
@bind_option
def check(
    args: tuple[str, ...],
    config_file: Path | None,
    tunnel_host: str | None,
    name: str | None,
    bind: str | None,
) -> int:
    """Check this machine, the configuration and each remote. No login is tried over SSH; laptops
    behind tunnels are asked.

    With HOST: what ssh makes of it by its configuration, and what of that hpcfs can't obey.

    With --tunnel, on the laptop: log in, and try what a tunnel needs. Nothing stays behind.

    The exit code is 1 if something would stop a mount or a namespace, or the tunnel.
    """
    if tunnel_host is not None:
        if args:
            raise click.UsageError("--tunnel checks the tunnel only, no NAME=URL")
        return check_tunnel.check(config_file, tunnel_host, name, bind, _show)
    if name or bind:
        raise click.UsageError("--name and --bind go with --tunnel")
    levels = [_show(found) for found in _all(args, config_file)]
    return 1 if "fail" in levels else 0


def _all(args: tuple[str, ...], config_file: Path | None) -> Iterator[Finding]:
    yield from check_machine.machine()
    try:
        chosen = config.load(config_file, arguments.recognise(_as_urls(args)).named_urls)
    except SetupError as error:
        yield Finding("fail", "configuration", str(error))
        return
    yield Finding("ok", "configuration", count(len(chosen.namespaces), "namespace"))
    for note in chosen.notes:
        yield Finding("warn", "configuration", note)
    yield from check_machine.mount_place(chosen)
    yield from check_machine.cache(chosen)
    yield from _namespaces(chosen)


def _as_urls(args: Sequence[str]) -> list[str]:
    """Turn a bare HOST into a URL of what `ssh HOST` reaches: a check has no mount point."""

    def is_host(text: str) -> bool:
        return not set(text) & set(":/=") and not os.path.isdir(text)

    if len(args) == 1:
        return [f"{text}:" if is_host(text) else text for text in args]
    return [f"{text}={text}:" if is_host(text) else text for text in args]


def _namespaces(chosen: Config) -> Iterable[Finding]:
    for found in chosen.namespaces.values():
        yield from _namespace(found)


def _namespace(found: NamespaceConfig) -> Iterator[Finding]:
    if isinstance(found.site, SshSite):
        yield from check_ssh.ssh_namespace(found.name, found.site)
    elif isinstance(found.site, S3Site) and isinstance(found.root, S3Root):
        yield from check_s3.s3_namespace(found.name, found.site, found.root)
    elif isinstance(found.site, TunnelSite) and isinstance(found.root, SftpRoot):
        yield from check_laptop.laptop_namespace(found.name, found.site, found.root)


def _show(found: Finding) -> str:
    """Print a finding at once, since an endpoint that is down takes a while; return its level."""
    level = click.style(f"{found.level:<4}", fg=_COLOURS[found.level])
    text = printable(" ".join(found.text.split()))
    click.echo(f"{level}  {printable(found.subject)}: {text}", color=sys.stdout.isatty())
    return found.level
