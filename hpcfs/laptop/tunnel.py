"""The life cycle of a tunnel: log in, open forwards, publish the file; reconnect when it is lost.

The mounts' open files outlive a connection (laptop/acceptor.py, tunnel/stream.py), so a lost one
only needs to be replaced soon. The first login must succeed; after that only errors that the user
alone can mend end the tunnel.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import asyncssh

from hpcfs import __version__
from hpcfs.laptop import forwards, publishing
from hpcfs.laptop.connected_mounts import ConnectedMounts
from hpcfs.laptop.forwards import ForwardEnds, Forwards
from hpcfs.laptop.identity import TunnelIdentity
from hpcfs.laptop.pauses import Pauses, is_unreached
from hpcfs.laptop.publishing import TunnelDirectory
from hpcfs.laptop.rates import Rate
from hpcfs.laptop.sftp_server import Shares
from hpcfs.laptop.shares import Share
from hpcfs.laptop.status import MountSeen, TunnelState, TunnelStatus
from hpcfs.model.errors import (
    NoService,
    RemoteError,
    RemoteFailure,
    TimedOut,
    Unreachable,
    WrongSettings,
)
from hpcfs.model.sites import SshSite
from hpcfs.remotes import machine_changes
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.machine_changes import MachineChange
from hpcfs.remotes.sftp.channels import check_service
from hpcfs.remotes.sftp.translate import translated
from hpcfs.remotes.ssh.login import SshLogin, log_in
from hpcfs.remotes.ssh.receiver import shorten
from hpcfs.remotes.ssh.sender import shorten_sending
from hpcfs.tunnel.file import Endpoint, Rendezvous, UnixEndpoint

log = logging.getLogger(__name__)

KEEPALIVE_SECONDS = 2.5
KEEPALIVES_MISSED = 3
"""Keepalives without an answer: a dead connection is noticed within 10 s, for which a mount
waits."""
REACH_SECONDS = 2.0
"""Seconds that a later attempt has for its TCP connection: a lost SYN is sent again after 1 s, then
only after 3 more, and the network may be back by then."""
SETUP_SECONDS = 30.0
WATCH_SECONDS = 15.0
ANSWER_SECONDS = 10.0
TEST_SECONDS = 2.0
FAREWELL_SECONDS = 5.0


@dataclass(frozen=True)
class TunnelPlan:
    """The tunnel that the user asked for. `shown` is the host as they named it."""

    name: str
    site: SshSite
    shown: str
    shares: tuple[Share, ...] = ()
    bind: str | None = None
    log_file: str = ""


class Tunnel:
    """A tunnel. `on_change` is called when the state has changed, or a mount came or went."""

    def __init__(self, plan: TunnelPlan, prompter: Prompter, on_change: Callable[[], None]) -> None:
        if plan.site.transport != "asyncssh":
            raise WrongSettings(
                f"a tunnel to {plan.shown} needs forwards, which transport = "
                f'"{plan.site.transport}" can\'t make: name a host or namespace without that key'
            )
        self.plan = plan
        self.identity = TunnelIdentity()
        self._shares = Shares(plan.shares)
        self._mounts = ConnectedMounts(self._shares, self.identity, on_change)
        self._prompter = prompter
        self._on_change = on_change
        self._started = self._since = time.time()
        self._state: TunnelState = "connecting"
        self._reason = ""
        self._next_try: float | None = None
        self._forwards = Forwards()
        self._up, self._down = Rate(), Rate()
        self._news = asyncio.Event()
        self._stopping = asyncio.Event()
        self._change: MachineChange | None = None
        self._retries_at_once = False
        """Whether the connection did not survive a change, so that there is nothing to wait for."""

    def stop(self) -> None:
        """Make `run` return soon."""
        self._stopping.set()
        self._news.set()

    async def run(self) -> None:
        """Keep the tunnel up until `stop`. Raises the RemoteError that ends the tunnel; nothing is
        left on the cluster then, as far as it can be reached."""
        pauses = Pauses()
        sampling = asyncio.create_task(self._sample())
        try:
            async with machine_changes.watched(self._changed):
                while not self._stopping.is_set():
                    error = await self._try_once(pauses)
                    if error is not None and not self._stopping.is_set():
                        await self._recover(error, pauses)
        finally:
            self._mounts.acceptor.close()
            self._shares.close()
            sampling.cancel()
            await asyncio.wait([sampling])

    async def _try_once(self, pauses: Pauses) -> RemoteError | None:
        """Run one connection; return why it failed or was lost, None where the tunnel was to
        stop."""
        try:
            await self._one_login(pauses)
        except RemoteError as error:
            return error
        except Exception as error:  # it must not end a tunnel that runs for weeks
            log.exception("the connection failed in a way that was not foreseen")
            return RemoteFailure(f"the connection failed: {error}")
        return None

    async def _recover(self, error: RemoteError, pauses: Pauses) -> None:
        """Wait before the next attempt. Raises the error where a retry is pointless; a login that
        worked before is retried."""
        if self._state == "connecting" or (error.lasting and not isinstance(error, NoService)):
            raise error
        pause = 0.0 if self._retries_at_once else pauses.after(error)
        self._retries_at_once = False
        self._next_try = time.time() + pause
        self._set_state("lost", error.message)
        await self._pause(pause, cut_by_network=is_unreached(error))
        self._next_try = None

    async def _pause(self, seconds: float, *, cut_by_network: bool) -> None:
        """Wait, but end early after sleep: a machine that woke up has another network. After a
        change of addresses only an unreached host is tried at once; one that refused may have the
        same reason as before."""
        end = time.monotonic() + seconds
        while not self._stopping.is_set() and (left := end - time.monotonic()) > 0:
            change = self._take_change()
            if change == "slept" or (change and cut_by_network):
                return
            await self._wait_for_news(left)

    # --- one connection ---------------------------------------------------------------------------

    async def _one_login(self, pauses: Pauses) -> None:
        """Hold one connection until the tunnel is to stop. Raises RemoteError."""
        self._change = None
        reach = None if self._state == "connecting" else REACH_SECONDS
        login = await self._log_in(reach)
        losing = asyncio.create_task(self._wake_when(login.ended))
        directory: TunnelDirectory | None = None
        answers = True
        try:
            login.connection.set_keepalive(KEEPALIVE_SECONDS, KEEPALIVES_MISSED)
            for connection in (*login.jumps, login.connection):
                shorten(connection)
                shorten_sending(connection)
            directory = await self._set_up(login)
            pauses.reset()
            await self._watch(directory, login.ended)
        except Unreachable:
            answers = False
            raise
        finally:
            losing.cancel()
            if directory is not None and answers:
                await self._withdraw(directory)
            await login.close()

    async def _log_in(self, reach: float | None) -> SshLogin:
        """Log in, or give up when the tunnel is to stop."""
        logging_in = asyncio.create_task(log_in(self.plan.site, self._prompter, reach))
        while not logging_in.done() and not self._stopping.is_set():
            hearing = asyncio.create_task(self._news.wait())
            await asyncio.wait([logging_in, hearing], return_when=asyncio.FIRST_COMPLETED)
            self._news.clear()
            hearing.cancel()
        if not logging_in.done():
            logging_in.cancel()
            await asyncio.wait([logging_in])
        if logging_in.cancelled():
            raise Unreachable("the tunnel is being stopped")
        return logging_in.result()

    async def _set_up(self, login: SshLogin) -> TunnelDirectory:
        """Open the forwards, then write the file that names them."""
        try:
            async with asyncio.timeout(SETUP_SECONDS):
                with translated(b"", login.shown):
                    return await self._publish(login)
        except TimeoutError:
            raise TimedOut(
                f"{login.shown} let us in, but did not answer within {SETUP_SECONDS:g} s"
            ) from None

    async def _publish(self, login: SshLogin) -> TunnelDirectory:
        name, identity = self.plan.name, self.identity
        if self._state == "connecting":  # asyncssh's client would wait forever
            with suppress(asyncssh.ChannelOpenError):  # reported below
                await check_service(login)
        sftp = await publishing.start_sftp(login)
        directory = await publishing.open_directory(sftp, login.shown)
        await directory.check_free(login.connection, name, identity.id)
        ends = ForwardEnds(login, sftp, self._mounts.acceptor)
        path = directory.new_socket(name)
        try:
            self._forwards = await forwards.open_forwards(ends, path, self.plan.bind)
            for place in self._forwards.places:
                if isinstance(place, UnixEndpoint):
                    await directory.secure_socket(place.path)
            await directory.write(self._rendezvous(directory.host))
        except BaseException:
            await directory.remove_socket(path)
            raise
        await directory.remove_remains(name, path)
        for note in self._forwards.notes:
            log.warning("%s", note)
        self._set_state("up", "")
        return directory

    def _rendezvous(self, login_host: str) -> Rendezvous:
        return Rendezvous(
            id=self.identity.id,
            secret=self.identity.secret,
            name=self.plan.name,
            laptop=socket.gethostname(),
            user=pwd.getpwuid(os.getuid()).pw_name,
            login_host=login_host,
            since=time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self._started)),
            places=self._forwards.places,
            host_key=self.identity.host_key_line,
            client_key=self.identity.client_key_text,
            shares=[share.name for share in self.plan.shares],
        )

    async def _watch(self, directory: TunnelDirectory, ended: asyncio.Event) -> None:
        """Watch the connection until it is lost, or the tunnel is to stop."""
        shown = directory.shown
        while not self._stopping.is_set():
            await self._wait_for_news(WATCH_SECONDS)
            if ended.is_set():
                raise Unreachable(f"the connection to {shown} was lost")
            if not self._stopping.is_set():
                self._retries_at_once = self._take_change() is not None
                await self._check_file(
                    directory, TEST_SECONDS if self._retries_at_once else ANSWER_SECONDS
                )
                self._retries_at_once = False

    async def _check_file(self, directory: TunnelDirectory, limit: float) -> None:
        """Check that the file is there, which also tests whether the login node still answers."""
        try:
            async with asyncio.timeout(limit):
                if not await directory.is_ours(self.plan.name, self.identity.id):
                    log.warning("the tunnel's file on %s is gone: written anew", directory.shown)
                    await directory.write(self._rendezvous(directory.host))
        except TimeoutError:
            raise TimedOut(f"{directory.shown} did not answer within {limit:g} s") from None

    async def _withdraw(self, directory: TunnelDirectory) -> None:
        """Remove the file. If that fails, the next tunnel or a mount will find it to be stale."""
        try:
            async with asyncio.timeout(FAREWELL_SECONDS):
                await directory.withdraw(self.plan.name, self.identity.id)
                if self._stopping.is_set():  # mounts need not wait for its return
                    await self._mounts.close()
        except (RemoteError, TimeoutError) as error:
            log.warning("the tunnel's file on %s could not be removed: %s", directory.shown, error)

    # --- news -------------------------------------------------------------------------------------

    async def _wake_when(self, ended: asyncio.Event) -> None:
        await ended.wait()
        self._news.set()

    def _changed(self, change: MachineChange) -> None:
        if self._change != "slept":
            self._change = change
        self._news.set()

    def _take_change(self) -> MachineChange | None:
        change, self._change = self._change, None
        return change

    async def _wait_for_news(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()

    # --- status -----------------------------------------------------------------------------------

    def _set_state(self, state: TunnelState, reason: str) -> None:
        if state != self._state:
            self._since = time.time()
        self._state, self._reason = state, reason
        if state == "up":
            log.info("the tunnel %s to %s is up", self.plan.name, self.plan.shown)
        else:
            log.warning("the tunnel %s to %s: %s", self.plan.name, self.plan.shown, reason)
        self._on_change()

    async def _sample(self) -> None:
        while True:
            self._up.note(time.monotonic(), self._shares.traffic.sent)
            self._down.note(time.monotonic(), self._shares.traffic.received)
            await asyncio.sleep(1.0)

    def status(self) -> TunnelStatus:
        """Return the status as it is now."""
        return TunnelStatus(
            name=self.plan.name,
            host=self.plan.shown,
            pid=os.getpid(),
            version=__version__,
            started=self._started,
            state=self._state,
            since=self._since,
            reason=self._reason,
            next_try=self._next_try and max(0.0, self._next_try - time.time()),
            places=[_shown(place) for place in self._forwards.places],
            notes=self._forwards.notes,
            shares=[str(share) for share in self.plan.shares],
            mounts=[MountSeen(mount.host, mount.since) for mount in self._mounts.all],
            up=self._shares.traffic.sent,
            down=self._shares.traffic.received,
            up_rate=self._up.now(),
            down_rate=self._down.now(),
            log_file=self.plan.log_file,
        )


def _shown(place: Endpoint) -> str:
    return place.path if isinstance(place, UnixEndpoint) else f"{place.host} port {place.port}"
