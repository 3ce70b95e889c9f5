"""The entry point: finds the command, and turns every failure into one line and an exit code.

Commands are imported when they are used; their help lines are here, since `hpcfs --help` must not
wait for trio, pyfuse3 or rich. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 out of time, 130
ended by Ctrl-C.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import click

from hpcfs import __version__
from hpcfs.cli.output import complain, show_traceback
from hpcfs.model.errors import SetupError


@dataclass(frozen=True, slots=True)
class LazyCommand:
    """A command that is imported when it is used."""

    module: str
    attribute: str
    help: str


COMMANDS = {
    "mount": LazyCommand("hpcfs.cli.mount", "mount", "Mount clusters and buckets as one tree."),
    "run": LazyCommand("hpcfs.cli.run", "run", "Mount for one command."),
    "umount": LazyCommand("hpcfs.cli.umount", "umount", "Unmount, after pending uploads."),
    "status": LazyCommand("hpcfs.cli.status", "status", "Show mounts, and what is not uploaded."),
    "login": LazyCommand("hpcfs.cli.login", "login", "Log in where a login was refused."),
    "sync": LazyCommand("hpcfs.cli.sync", "sync", "Wait until all is uploaded."),
    "retry": LazyCommand("hpcfs.cli.retry", "retry", "Try again what could not be uploaded."),
    "recover": LazyCommand("hpcfs.cli.recover", "recover", "Copy out what is not uploaded."),
    "discard": LazyCommand("hpcfs.cli.discard", "discard", "Give up what is not uploaded."),
    "cache": LazyCommand("hpcfs.cli.cache", "cache", "Show, fill, clear and verify caches."),
    "check": LazyCommand("hpcfs.cli.check", "check", "Find out what would stop a mount."),
    "tunnel": LazyCommand("hpcfs.cli.tunnel", "tunnel", "Share this laptop with a cluster."),
    "init": LazyCommand("hpcfs.cli.init", "init", "Write a commented configuration."),
    "demo": LazyCommand("hpcfs.cli.demo", "demo", "Mount embedded servers, to try it out."),
}
ALIASES = {"unmount": "umount"}


@dataclass(slots=True)
class Invocation:
    """Options of the command line that error handling needs."""

    debug: bool = False


class LazyGroup(click.Group):
    """The `hpcfs` command, whose subcommands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Import a command; None where there is no such one."""
        lazy = COMMANDS.get(ALIASES.get(name, name))
        if lazy is None:
            return None
        command = getattr(importlib.import_module(lazy.module), lazy.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.help) for name, lazy in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hpcfs", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback when something fails.")
@click.pass_obj
def group(invocation: Invocation, debug: bool) -> None:
    """SSH clusters, S3 buckets and your laptop as one directory tree.

    \b
    hpcfs mount login3:data ~/mnt     mount one remote, as with sshfs
    hpcfs init; hpcfs mount           mount what the configuration names
    """
    invocation.debug = debug


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    invocation = Invocation()
    try:
        outcome = group.main(arguments, "hpcfs", standalone_mode=False, obj=invocation)
        sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return 130
    except click.UsageError as error:
        return _explain_usage(error)
    except BrokenPipeError:  # the reader of the pipe has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _explain(error, invocation)
    return outcome if isinstance(outcome, int) else 0


def _explain_usage(error: click.UsageError) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return 2
    complain(error.format_message())
    path = error.ctx.command_path if error.ctx else "hpcfs"
    print(f"Try '{path} --help'.", file=sys.stderr)
    return 2


def _explain(error: Exception, invocation: Invocation) -> int:
    if invocation.debug:
        show_traceback(error)
    if isinstance(error, SetupError):
        complain(str(error))
    elif isinstance(error, click.ClickException):
        complain(error.format_message())
    elif isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        complain(f"{where}{error.strerror}")
    else:
        complain(
            f"this should not have happened ({type(error).__name__}: {error}); "
            "'hpcfs --debug ...' shows where"
        )
    return 1
