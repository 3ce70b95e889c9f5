"""`hpcfs run`: mounts for one command, in a fresh directory, and unmounts once all is uploaded.

It is made for jobs of a batch system. The mount lives as long as this process does: the daemon
holds the other end of a pipe, and no signal that is meant for the job ends it before the job's
program has ended.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from hpcfs.cli import arguments, background, mount, umount
from hpcfs.cli.main import Invocation
from hpcfs.cli.mount import Options
from hpcfs.cli.output import complain
from hpcfs.cli.progress import ProgressBar
from hpcfs.config.config import Settings, unattended
from hpcfs.control import control, mountpoint
from hpcfs.control.control import ControlRequest
from hpcfs.model.errors import SetupError
from hpcfs.system import interpreter, signals, temporary, user_namespace

VARIABLE = "HPCFS_MOUNT"
NOT_RUN, CANNOT_RUN, NOT_FOUND = 125, 126, 127
"""The exit codes of env(1), nohup(1) and timeout(1) for failures other than the command's own."""
SI_KERNEL = 0x80
"""The si_code in siginfo_t for a key pressed on the terminal, whose signal the command gets,
too."""
FORWARDED = (*signals.OF_A_JOB, signal.SIGQUIT)


class _WithCommand(click.Command):
    """Splits the arguments at `--`, since click does not tell where it was."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options before `--`, and take the rest as the command."""
        ours, separator, command = args, "", []
        if "--" in args:
            at = args.index("--")
            ours, separator, command = args[:at], args[at], args[at + 1 :]
        rest = super().parse_args(ctx, ours)  # --help ends the process here
        if not separator or not command:
            raise click.UsageError("say what to run: hpcfs run [NAME=URL ...] -- COMMAND", ctx)
        ctx.params["command"] = tuple(command)
        return rest


@click.command(
    cls=_WithCommand,
    short_help="Mount for one command.",
    options_metavar="[OPTIONS] [NAME=URL ...] -- COMMAND [ARGUMENT ...]",
)
@click.argument("args", nargs=-1, metavar="")
@mount.options
@click.pass_obj
def run(
    invocation: Invocation, /, args: tuple[str, ...], command: tuple[str, ...], **chosen: object
) -> int:
    """Mount what the configuration or the URLs name, run COMMAND, wait until all that it wrote is
    uploaded, and unmount. COMMAND finds the mount at $HPCFS_MOUNT, a new directory of its own.

    \b
    hpcfs run -- sh -c 'python train.py "$HPCFS_MOUNT"/data'
    hpcfs run in=s3://bucket/set out=login3:results -- ./simulate

    The exit code is COMMAND's, or 1 if something that it wrote could not be uploaded. It is 125 if
    a remote could not be mounted, and COMMAND was not run; 126 or 127 if it can't be.
    """
    wanted = arguments.recognise(args)
    if wanted.mountpoint is not None:
        raise click.UsageError(
            f"{wanted.mountpoint} is no remote, and a mount point is not to be named: "
            f"the command finds it as ${VARIABLE}"
        )
    options = Options(**chosen)  # type: ignore[arg-type] # what click read, as mount.options says
    invocation.debug = invocation.debug or options.verbose
    try:
        with _directory() as place:
            return _Run(options, wanted.named_urls, place).run(command, debug=invocation.debug)
    except SetupError as error:
        complain(str(error))
        return NOT_RUN


@contextmanager
def _directory() -> Iterator[Path]:
    """Make a directory for this user alone; remove it afterwards, unless it is still mounted."""
    try:
        made = Path(os.path.realpath(temporary.make("hpcfs-run-")))
    except OSError as error:
        raise SetupError(
            f"no directory can be made in {tempfile.gettempdir()} ({error.strerror}): "
            "set TMPDIR to a directory of your own"
        ) from error
    try:
        yield made
    finally:
        with suppress(OSError):
            made.rmdir()


class _Run:
    """One mount for one command. Raises SetupError before the command has begun."""

    def __init__(
        self, options: Options, named_urls: list[tuple[str | None, str]], place: Path
    ) -> None:
        config = unattended(options.load(named_urls))
        if os.getuid() != 0 and not shutil.which("fusermount3"):
            user_namespace.enter()
        self._place = place
        self._settings: Settings = mount.prepare(config, str(place))

    def run(self, command: Sequence[str], *, debug: bool) -> int:
        """Mount, run the command, upload and unmount; return the exit code."""
        lifeline, ours = os.pipe()
        try:
            status = background.start(self._settings, debug=debug, owner=(lifeline, ours))
        except BaseException:
            os.close(ours)
            self._tidy_up(keep_log=True)
            raise
        finally:
            os.close(lifeline)
        failed = [found for found in status.namespaces if found.state == "failed"]
        code = NOT_RUN if failed else _run(command, self._environ())
        for found in failed:
            complain(f"{found.name}: {found.reason}")
        if failed:
            complain(f"{command[0]} was not run; name only the remotes that it needs")
        return self._end(ours, code)

    def _environ(self) -> dict[str, str]:
        return {**interpreter.given_environment(os.environ), VARIABLE: str(self._place)}

    def _end(self, ours: int, code: int) -> int:
        """Upload and unmount. From here on only Ctrl-C ends the waiting: other signals of a batch
        system are soon followed by SIGKILL anyway."""
        for number in signals.OF_A_JOB:
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_IGN)
        at = self._settings.socket
        try:
            with control.open_wait(at) as daemon:
                is_complete = self._upload(at)
                os.close(ours)
                if not control.wait_until_gone(daemon, umount.PATIENCE_SECONDS):
                    complain(f"waiting for the daemon of {self._place} to finish")
                    control.wait_until_gone(daemon, None)
        except KeyboardInterrupt:
            complain(
                "what is not uploaded stays in the journal: "
                f"'hpcfs recover {self._place} --to DIR' copies it"
            )
            return 130
        except SetupError as error:
            complain(f"whether all is uploaded is not known: {error}")
            self._unmount_dead()
            return code or 1
        if is_complete:
            self._tidy_up(keep_log=code != 0)
        return code if is_complete else code or 1

    def _upload(self, at: Path) -> bool:
        """Wait for the uploads; return whether the remotes have all data, and report what they
        don't have."""
        problem = ""
        try:
            with ProgressBar("uploading") as bar:
                patience = max(one.patience for one in self._settings.namespaces.values())
                control.work(at, ControlRequest("sync", patience=patience), bar.show)
        except SetupError as error:
            problem = str(error)
        status = control.query_status(at)
        if not umount.report_failures(status, problem):
            return True
        complain(
            f"'hpcfs recover {self._place} --to DIR' copies it; "
            f"the log is {self._settings.log_file}"
        )
        return False

    def _unmount_dead(self) -> None:
        with suppress(SetupError):  # in our own namespace the mount ends with this process
            if mountpoint.is_dead(self._place):
                mountpoint.unmount(self._place, lazy=True)

    def _tidy_up(self, *, keep_log: bool) -> None:
        """Remove this mount's cache, which nobody would use again: the next run mounts
        elsewhere."""
        shutil.rmtree(self._settings.cache_dir, ignore_errors=True)
        if not keep_log:
            self._settings.log_file.unlink(missing_ok=True)


def _run(command: Sequence[str], environ: dict[str, str]) -> int:
    """Run the command; return its exit code, or 128 plus the signal that ended it, as a shell
    does."""
    watched = {signal.SIGCHLD, *FORWARDED}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    ours = os.environ.get("PATH", os.defpath)
    try:
        os.environ["PATH"] = environ.get("PATH", os.defpath)  # posix_spawnp finds the command by it
        pid = os.posix_spawnp(
            command[0],
            list(command),
            environ,
            setsigmask=before,
            setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # which Python ignores
        )
    except FileNotFoundError:
        complain(f"{command[0]}: no such command")
        return NOT_FOUND
    except OSError as error:
        complain(f"{command[0]} can't be run: {error.strerror}")
        return CANNOT_RUN
    else:
        return _wait(pid, watched)
    finally:
        os.environ["PATH"] = ours
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(pid: int, watched: set[signal.Signals]) -> int:
    while True:
        told = signal.sigwaitinfo(watched)
        if told.si_signo != signal.SIGCHLD:
            if told.si_code != SI_KERNEL:
                os.kill(pid, told.si_signo)
            continue
        ended, status = os.waitpid(pid, os.WNOHANG)  # the ended child may be the daemon
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
