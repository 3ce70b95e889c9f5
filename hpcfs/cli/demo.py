"""`hpcfs demo`: a complete mount on servers of its own, to try hpcfs out; nothing to configure.

The servers and the laptop run in processes of their own over a temporary directory, the daemon as
`hpcfs mount` starts it. However the demo ends (Ctrl-C, SIGTERM, an error, `hpcfs umount`
elsewhere), all of it is removed: mount, servers, laptop, files.
"""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import click

from hpcfs.cache import location
from hpcfs.cli import background, tour, umount
from hpcfs.cli.main import Invocation
from hpcfs.cli.output import complain
from hpcfs.config import config
from hpcfs.config.config import Settings
from hpcfs.control import control, mountpoint
from hpcfs.control.control import MountStatus
from hpcfs.demo import running
from hpcfs.model.errors import SetupError
from hpcfs.system import paths
from hpcfs.system.text import printable

DEFAULT_MOUNTPOINT = "~/hpcfs-demo"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_SECONDS = 15.0
"""Seconds for the daemon to finish writing; the files are the demo's own."""


@click.command(short_help="Mount embedded servers, to try it out.")
@click.argument("place", metavar="[MOUNTPOINT]", default=DEFAULT_MOUNTPOINT)
@click.option("--tour", "wants_tour", is_flag=True, help="Show a few commands on it, then end.")
@click.option("--keep", is_flag=True, help="After the tour, stay mounted until Ctrl-C.")
@click.pass_obj
def demo(invocation: Invocation, place: str, wants_tour: bool, keep: bool) -> int:
    """Mount a cluster, a bucket and a laptop that this machine plays itself, until Ctrl-C.

    MOUNTPOINT is ~/hpcfs-demo if not given; it is made, and removed afterwards, if it is missing.
    """
    with ExitStack() as stack:
        try:
            _interrupt_on_signals()
            settings, status = _mount(stack, place, debug=invocation.debug)
            if wants_tour and not tour.run(settings.mountpoint):
                return 1
            if keep or not wants_tour:
                return _stay(settings, status)
        except KeyboardInterrupt:
            print("\nhpcfs demo: ending")
        finally:
            for number in SIGNALS:  # a second Ctrl-C must not interrupt the cleanup
                signal.signal(number, signal.SIG_IGN)
    return 0


def _interrupt_on_signals() -> None:
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores it on purpose
            signal.signal(number, signal.default_int_handler)


def _mount(stack: ExitStack, place: str, *, debug: bool) -> tuple[Settings, MountStatus]:
    """Mount the demo. Raises SetupError where one of the namespaces does not work."""
    target = paths.absolute_mountpoint(place)
    stack.enter_context(_directory(target))
    note = mountpoint.check(target)
    if note:
        complain(note)
    directory = stack.enter_context(running.remotes())
    chosen = config.load(directory / "config.toml")
    cache = location.prepare(location.locate(chosen.cache_dir), target)
    paths.make_private(paths.state_dir())
    settings = config.settings(chosen, target, cache)
    status = background.start(settings, debug=debug)
    stack.callback(_unmount, settings, status)
    for found in status.namespaces:
        if found.state == "failed":
            raise SetupError(f"the demo's {found.name} does not work: {found.reason}")
    return settings, status


@contextmanager
def _directory(target: Path) -> Iterator[None]:
    """Make the mount point; remove it afterwards if it was made here."""
    try:
        target.mkdir(mode=0o700)
    except FileExistsError:
        yield
        return
    try:
        yield
    finally:
        with suppress(OSError):  # no longer empty: then it is not ours to remove
            target.rmdir()


def _stay(settings: Settings, status: MountStatus) -> int:
    with control.open_wait(settings.socket) as daemon:  # before the welcome is printed
        print(_welcome(settings), flush=True)
        control.wait_until_gone(daemon, None)
    if mountpoint.is_dead(settings.mountpoint):
        raise SetupError(f"the daemon (pid {status.pid}) ended unexpectedly")
    print(printable(f"hpcfs demo: {settings.mountpoint} was unmounted; ending"))
    return 0


def _welcome(settings: Settings) -> str:
    place = settings.mountpoint
    own = Path(sys.argv[0]).resolve().with_name("hpcfs")
    on_path = shutil.which("hpcfs")
    command = "hpcfs" if on_path and Path(on_path).resolve() == own else str(own)
    return f"""
A cluster (SFTP), a bucket (S3) and a laptop behind a reverse tunnel, all of them played by this
machine, are one tree: {place}

Try in another terminal:
  cd {place}
  ls -l cluster bucket laptop
  cp -r laptop/data/inputs cluster/
  cp cluster/results/model.bin bucket/
  rsync -ai cluster/results bucket/
  {command} status

Ctrl-C here ends it and removes all of it."""


def _unmount(settings: Settings, status: MountStatus) -> None:
    """Unmount, also where a shell is still in it: the daemon then detaches the mount as it ends."""
    patience = END_SECONDS
    try:
        mountpoint.unmount(settings.mountpoint)
    except mountpoint.NotMounted:  # somebody was faster
        pass
    except mountpoint.Busy:
        users = ", ".join(umount.users_below(settings.mountpoint)) or "programs that can't be seen"
        complain(f"{settings.mountpoint} is still in use by {users}: it goes away nonetheless")
        patience = 0.0
    background.stop(status.pid, settings, patience=patience)
