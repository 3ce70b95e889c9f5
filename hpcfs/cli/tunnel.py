"""`hpcfs tunnel`, on the laptop: shares folders with a cluster that allows no outgoing
connections."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import click

from hpcfs.cli import tunnel_background
from hpcfs.cli.arguments import read_by
from hpcfs.cli.main import Invocation
from hpcfs.cli.output import ago, complain, json_line, size
from hpcfs.cli.tunnel_line import TunnelStatusLine, sentence
from hpcfs.config import tunnel as tunnel_config
from hpcfs.config.tunnel import TunnelSettings
from hpcfs.laptop import status
from hpcfs.laptop.shares import Share, collect
from hpcfs.laptop.status import TunnelStatus
from hpcfs.model.errors import SetupError
from hpcfs.system import paths
from hpcfs.system.text import printable

name_option = click.option(
    "--name",
    metavar="NAME",
    callback=read_by(tunnel_config.tunnel_name),
    help="What mounts call this laptop; else its host name.",
)
bind_option = click.option(
    "--bind",
    metavar="ADDR",
    callback=read_by(tunnel_config.bind_address),
    help="The login node's address as compute nodes reach it.",
)


@click.command(short_help="Share folders of this laptop with a cluster.")
@click.argument("host", metavar="[HOST]", required=False)
@name_option
@click.option("--share", "shares", metavar="[NAME=]DIR[:ro]", multiple=True, help="A folder.")
@bind_option
@click.option("--daemon", is_flag=True, help="Run in the background once the tunnel stands.")
@click.option("--stop", is_flag=True, help="End the tunnel that runs here.")
@click.option("--status", "tells", is_flag=True, help="Show the tunnels that run here.")
@click.option("--json", "as_json", is_flag=True, help="With --status: a JSON list, for scripts.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE")
@click.pass_obj
def tunnel(
    invocation: Invocation,
    host: str | None,
    name: str | None,
    shares: tuple[str, ...],
    bind: str | None,
    daemon: bool,
    stop: bool,
    tells: bool,
    as_json: bool,
    config_file: Path | None,
) -> int:
    """Share folders with the cluster behind the login node HOST, until Ctrl-C.

    \b
    hpcfs tunnel login3 --share ~/data --share code=~/src:ro
    hpcfs tunnel                       as the [tunnel] table of the configuration says
    hpcfs tunnel --status [NAME]       what runs here
    hpcfs tunnel --stop [NAME]         end it

    HOST is an alias of ~/.ssh/config, user@host, sftp://user@host:port, or an sftp namespace of
    the configuration. On the cluster: hpcfs mount laptop=tunnel:NAME ~/mnt
    """
    if stop and tells:
        raise click.UsageError("--stop and --status are two commands")
    if stop or tells:
        if shares or bind or daemon:
            raise click.UsageError("--share, --bind and --daemon are for starting a tunnel")
        named = host or name
        return _report(named, as_json=as_json) if tells else _stop(named)
    if as_json:
        raise click.UsageError("--json goes with --status")
    settings = tunnel_config.load(config_file, host, name, shares, bind)
    shared = collect(settings.shares, Path.cwd(), paths.home())
    if daemon:
        _start(settings, shared, debug=invocation.debug)
    else:
        line = TunnelStatusLine()
        with line.drawn():
            _serve(settings, shared, line.ask, line.show, to_stderr=not sys.stderr.isatty())
    return 0


def _serve(
    settings: TunnelSettings,
    shares: tuple[Share, ...],
    ask: Callable[[str, bool], str | None],
    show: Callable[[TunnelStatus], None],
    *,
    to_stderr: bool,
) -> None:
    """Run the tunnel. Imports modules that other commands need not wait for."""
    from hpcfs.laptop import running

    running.run(settings, shares, ask, show, to_stderr=to_stderr)


def _start(settings: TunnelSettings, shares: tuple[Share, ...], *, debug: bool) -> None:
    line = TunnelStatusLine()

    def serve(show: Callable[[TunnelStatus], None]) -> None:
        _serve(settings, shares, line.ask, show, to_stderr=False)

    found = tunnel_background.start(serve, debug=debug)
    for note in found.notes:
        complain(note)
    if sys.stdout.isatty():
        print(printable(f"the tunnel {found.name} to {found.host} is up (log: {found.log_file})"))


def _stop(named: str | None) -> int:
    names = [named] if named else [found.name for found in _query(None)[0]]
    if len(names) > 1:
        raise SetupError(f"several tunnels run here: name one of {', '.join(names)}")
    if not names:
        raise SetupError("no tunnel runs here")
    status.stop(names[0])
    return 0


def _report(named: str | None, *, as_json: bool) -> int:
    """Print the tunnels; return the exit code: 0 if there is one, and all that are shown answer."""
    found, failures = _query(named)
    for failure in failures:
        complain(failure)
    if as_json:
        print(json_line(found))
    elif found:
        print("\n\n".join(_describe(one) for one in found))
    elif not failures:
        complain(f"no tunnel {f'named {named} ' if named else ''}runs here")
    return 0 if found and not failures else 1


def _query(named: str | None) -> tuple[list[TunnelStatus], list[str]]:
    """Return the tunnels that answer, and why others don't. A tunnel that was killed left its
    socket: it is skipped."""
    found: list[TunnelStatus] = []
    failures: list[str] = []
    for name in [named] if named else status.running():
        try:
            found.append(status.query(name))
        except status.TunnelNotRunning:
            continue
        except SetupError as error:
            failures.append(str(error))
    return found, failures


def _describe(one: TunnelStatus) -> str:
    lines = [f"{sentence(one)} (pid {one.pid}, log: {one.log_file})"]
    lines += [f"  shares: {', '.join(one.shares)}", f"  reached at: {', '.join(one.places)}"]
    lines += [f"  note: {note}" for note in one.notes]
    lines += [f"  mount on {seen.host}, for {ago(seen.since)}" for seen in one.mounts]
    lines.append(f"  sent: {size(one.up)}, received: {size(one.down)}")
    return "\n".join(printable(line) for line in lines)
