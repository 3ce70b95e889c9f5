"""`hpcfs mount`: checks what can be checked, starts the daemon, and reports the result."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from hpcfs.cache import location
from hpcfs.cli import arguments, background, pending, terminal
from hpcfs.cli.arguments import read_by
from hpcfs.cli.main import Invocation
from hpcfs.cli.output import complain, count
from hpcfs.config import config, values as config_values
from hpcfs.config.config import Config, Settings
from hpcfs.control import mountpoint
from hpcfs.control.control import MountStatus
from hpcfs.model.errors import SetupError
from hpcfs.system import paths
from hpcfs.system.text import printable


def _absolute_path(value: object) -> Path:
    """Read a path. Unlike the configuration's paths, the shell's may be relative."""
    text = str(value)
    return config_values.local_path(text if text.startswith(("~", "$")) else str(Path.cwd() / text))


cache_dir_option = click.option(
    "--cache-dir", metavar="DIR", callback=read_by(_absolute_path), help="Where the caches are."
)


@dataclass(frozen=True, slots=True)
class Options:
    """The options of every command that mounts, as `options` declares them."""

    config_file: Path | None
    verbose: bool
    read_only: bool
    cache_dir: Path | None
    cache_size: int | None
    write: config_values.WriteMode | None
    symlinks: config_values.SymlinkMode | None
    patience: float | None

    def load(self, named_urls: Sequence[tuple[str | None, str]]) -> Config:
        """Return the configuration, changed by the options. Raises SetupError."""
        chosen = config.load(self.config_file, named_urls)
        chosen = replace(
            chosen,
            cache_dir=self.cache_dir or chosen.cache_dir,
            cache_size=self.cache_size or chosen.cache_size,
            log_level="DEBUG" if self.verbose else chosen.log_level,
        )
        chosen = config.writing(chosen, self.write) if self.write else chosen
        chosen = config.with_symlinks(chosen, self.symlinks) if self.symlinks else chosen
        chosen = config.with_patience(chosen, self.patience) if self.patience else chosen
        return config.read_only(chosen) if self.read_only else chosen


def options(command: Callable[..., object]) -> Callable[..., object]:
    """Declare the click options that make up `Options`."""
    declared = [
        click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE"),
        click.option("--verbose", "-v", is_flag=True, help="Log more; show tracebacks."),
        click.option("--read-only", is_flag=True, help="Refuse to change anything on the remotes."),
        cache_dir_option,
        click.option("--cache-size", metavar="SIZE", callback=read_by(config_values.disk_size)),
        click.option(
            "--write",
            metavar="through|back",
            callback=read_by(config_values.write_mode),
            help="What closing a file waits for: the remote, or the local disk.",
        ),
        click.option(
            "--symlinks",
            metavar="contain|follow|hide",
            callback=read_by(config_values.symlink_mode),
            help="Where symbolic links of the remotes may lead: into their folder, or anywhere.",
        ),
        click.option(
            "--patience",
            metavar="TIME",
            callback=read_by(config_values.duration),
            help='For how long an outage is only a pause, as in "15 min".',
        ),
    ]
    for option in reversed(declared):
        command = option(command)
    return command


@click.command(short_help="Mount clusters and buckets as one tree.")
@click.argument("args", nargs=-1, metavar="[MOUNTPOINT] [NAME=URL ...]")
@click.option("--foreground", "-f", is_flag=True, help="Stay here, and log to stderr too.")
@options
@click.pass_obj
def mount(
    invocation: Invocation, /, args: tuple[str, ...], foreground: bool, **chosen: object
) -> None:
    """Mount what the configuration or the URLs name.

    \b
    hpcfs mount                                   everything as configured
    hpcfs mount login3:data ~/mnt                 one remote, as with sshfs
    hpcfs mount ~/mnt home=login3: data=s3://bucket/prefix

    URLs: [user@]host:path, sftp://[user@]host[:port]/path, s3://bucket/prefix, or REMOTE:path for
    a remote of rclone.conf. With URLs, the configuration's namespaces are left aside.
    """
    given = Options(**chosen)  # type: ignore[arg-type] # what click read, as `options` declares
    invocation.debug = invocation.debug or given.verbose
    wanted = arguments.recognise(args)
    settings = prepare(given.load(wanted.named_urls), wanted.mountpoint)
    if foreground:
        _serve_here(settings)
    else:
        _report(background.start(settings, debug=invocation.debug), settings)


def prepare(chosen: Config, mountpoint_text: str | None) -> Settings:
    """Check the mount point, prepare the cache and return the settings; nothing needs the network.
    Raises SetupError."""
    given = mountpoint_text or chosen.mountpoint
    if given is None:
        raise SetupError("say where to mount: 'hpcfs mount ~/cluster', or set mountpoint")
    place = paths.absolute_mountpoint(given)
    notes = [*chosen.notes, mountpoint.check(place)]
    where = location.locate(chosen.cache_dir)
    if where.directory.is_relative_to(place):
        raise SetupError(f"the cache {where.directory} can't be inside the mount {place}")
    cache = location.prepare(where, place)
    paths.make_private(paths.state_dir())
    for note in [*notes, where.note]:
        if note:
            complain(note)
    return config.settings(chosen, place, cache)


def _report(status: MountStatus, settings: Settings) -> None:
    failed = [found for found in status.namespaces if found.state == "failed"]
    for found in failed:
        complain(f"{found.name}: {found.reason}")
    _report_pending(status)
    if sys.stdout.isatty():
        number = count(len(status.namespaces) - len(failed), "namespace")
        print(printable(f"mounted {number} at {status.mountpoint} (log: {settings.log_file})"))


def _report_pending(status: MountStatus) -> None:
    """Report files that an earlier mount left."""
    stuck = pending.stuck(status)
    if resumed := status.resumed_files:
        complain(f"{count(resumed, 'file')} of an earlier mount: the upload goes on")
    if stuck:
        complain(f"{count(stuck, 'file')} could not be uploaded earlier: 'hpcfs status' says why")


def _serve_here(settings: Settings) -> None:
    """Serve in the foreground; return once unmounted. Raises SetupError where mounting was of no
    use.

    Messages are in the log, which goes to stderr here.
    """
    failures: list[str] = []

    def on_ready(status: MountStatus) -> None:
        if failure := background.root_failure(settings, status):
            failures.append(failure)
            # Not in this thread: it answers the kernel, which asks while it unmounts.
            threading.Thread(target=mountpoint.unmount, args=[settings.mountpoint]).start()

    try:
        with terminal.restored():
            background.serve(settings, on_ready=on_ready, foreground=True)
    except Exception as error:
        raise SetupError(background.sentence_of(error)) from error
    if failures:
        raise SetupError(failures[0])
