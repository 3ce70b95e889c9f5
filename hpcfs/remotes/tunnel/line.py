"""A stream to the laptop that finds its own way back: it connects, notices a break and connects
again.

A break is noticed in three ways: the connection ends; nothing is heard though the laptop was
asked (it sleeps, or its network is gone); or the rendezvous file changed, which the tunnel writes
anew when it is back. For a while requests then wait and nothing above notices; after that the
stream is given up, and they fail.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hpcfs.model.errors import RemoteError, Unreachable
from hpcfs.remotes.tunnel.pipe import NoAnswer, OpenedPipe, PipeEnd, Silent, TurnedAway, connect
from hpcfs.tunnel import file
from hpcfs.tunnel.file import Endpoint, Rendezvous, UnixEndpoint
from hpcfs.tunnel.knock import TunnelHandshake
from hpcfs.tunnel.stream import NEW_STREAM, ProtocolViolation, TunnelStream

log = logging.getLogger(__name__)

ASK_SECONDS = 2.0
SILENT_SECONDS = 6.0
GRACE_SECONDS = 10.0
"""How long requests wait for the laptop after a break: a tunnel whose ssh connection was cut is
back after two or three, and a user who waits longer for a sleeping laptop would rather be told."""
LOOK_SECONDS = 0.25
"""Between looks at the rendezvous file, one stat each, while there is no connection."""
CHECK_SECONDS = 1.0
"""The same while there is one."""
CROWD_SECONDS = 2.0
CROWD_PAUSE_SECONDS = 0.02
"""How long, and how often, one tries again where the connection was closed at once: strangers may
crowd at the handshake."""

T = TypeVar("T")


@dataclass(frozen=True)
class RendezvousFile:
    """The rendezvous file of a tunnel, by its directory and name."""

    directory: Path
    name: str

    def read(self) -> Rendezvous:
        """Read the file. Raises Unreachable or WrongSettings."""
        return file.read(self.directory, self.name)

    def stamp(self) -> file.Stamp | None:
        """Return what tells one version of the file from another; None where there is none."""
        return file.stamp(self.directory, self.name)

    async def changed(self, known: file.Stamp | None, every: float = LOOK_SECONDS) -> None:
        """Wait until the file is another one than when it had that stamp."""
        now = self.stamp()
        while now == known:
            await asyncio.sleep(every)
            now = self.stamp()


@dataclass
class Pulse:
    """When the laptop was last heard, on any line of a session: one question serves all."""

    heard_at: float = 0.0
    asked_at: float = 0.0


class _StreamGone(Exception):
    """Raised when the laptop has no such stream any more."""


class Line:
    """A stream, and the pipe that carries it at the moment."""

    def __init__(
        self,
        rendezvous_file: RendezvousFile,
        pulse: Pulse,
        stamp: file.Stamp | None,
        rendezvous: Rendezvous,
        place: Endpoint,
    ) -> None:
        self.rendezvous = rendezvous
        self._pulse = pulse
        self._stamp = stamp
        """Of the file, before it was read: what changes afterwards is another one."""
        self.is_private = isinstance(place, UnixEndpoint)
        """Nobody but the user can reach the place: see tunnel/proof.py."""
        self._rendezvous_file = rendezvous_file
        self._loop = asyncio.get_running_loop()

    @classmethod
    async def open(cls, rendezvous_file: RendezvousFile, pulse: Pulse) -> Line:
        """Open a stream to the laptop. Raises Unreachable or WrongSettings."""
        stamp = rendezvous_file.stamp()
        opening = cls._open(rendezvous_file, pulse, stamp, rendezvous_file.read())
        return await _unless_moved(rendezvous_file, stamp, opening)

    @classmethod
    async def _open(
        cls,
        rendezvous_file: RendezvousFile,
        pulse: Pulse,
        stamp: file.Stamp | None,
        rendezvous: Rendezvous,
    ) -> Line:
        place, opened = await _meet(rendezvous, rendezvous.places, NEW_STREAM, 0)
        if opened.stream_id == NEW_STREAM:
            opened.pipe.close()
            raise Unreachable(f"the tunnel {rendezvous.name} takes no more connections now")
        line = cls(rendezvous_file, pulse, stamp, rendezvous, place)
        line.stream = TunnelStream(opened.stream_id)
        opened.pipe.carry(line.stream, opened.seen)
        line._tending = asyncio.create_task(line._tend(opened.pipe))
        return line

    stream: TunnelStream
    _tending: asyncio.Task[None]

    async def close(self) -> None:
        """End the stream and its pipe."""
        self.stream.close()
        self._tending.cancel()
        await asyncio.wait([self._tending])

    async def _tend(self, pipe: PipeEnd) -> None:
        """Keep the stream on a pipe until it is over."""
        while not await self._until_broken(pipe):
            self.stream.detach(pipe)
            pipe.close()
            log.info("the connection to %s broke: trying to go on", self.shown)
            try:
                async with asyncio.timeout(GRACE_SECONDS):
                    pipe = await self._again()
            except TimeoutError:
                self.stream.end(f"{self.shown} did not come back within {GRACE_SECONDS:g} s")
            except (_StreamGone, RemoteError) as error:
                self.stream.end(str(error))
            else:
                log.info("the connection to %s goes on", self.shown)

    @property
    def shown(self) -> str:
        """The laptop's name, for messages."""
        return f"the laptop {self.rendezvous.name}"

    async def _until_broken(self, pipe: PipeEnd) -> bool:
        """Whether the stream is over."""
        pulse = self._pulse
        pipe.heard_at = pulse.heard_at = self._loop.time()
        while not self.stream.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_SECONDS):
                    await pipe.broken.wait()
            now = self._loop.time()
            pulse.heard_at = max(pulse.heard_at, pipe.heard_at)
            silence = now - pulse.heard_at
            moved = self._rendezvous_file.stamp() != self._stamp
            if pipe.broken.is_set() or moved or silence > SILENT_SECONDS:
                break
            if silence >= ASK_SECONDS and now - pulse.asked_at >= ASK_SECONDS:
                pulse.asked_at = now
                self.stream.ask()
        return self.stream.ended

    async def _again(self) -> PipeEnd:
        """Return a new pipe that carries the stream. Raises _StreamGone where that can't be."""
        while True:
            self._stamp = self._rendezvous_file.stamp()
            try:
                rendezvous = self._rendezvous_file.read()
                if rendezvous.id != self.rendezvous.id:
                    raise _StreamGone(f"'hpcfs tunnel' was started anew on {self.shown}")
                self.rendezvous = rendezvous
                resuming = self._resume(rendezvous)
                return await _unless_moved(self._rendezvous_file, self._stamp, resuming)
            except Unreachable as error:
                log.debug("%s", error.message)
            await asyncio.sleep(LOOK_SECONDS)

    async def _resume(self, rendezvous: Rendezvous) -> PipeEnd:
        places = [
            place
            for place in rendezvous.places
            if isinstance(place, UnixEndpoint) == self.is_private
        ]
        _, opened = await _meet(rendezvous, places, self.stream.id, self.stream.received)
        if opened.stream_id != self.stream.id:
            opened.pipe.close()
            raise _StreamGone(f"{self.shown} has given the connection up")
        try:
            opened.pipe.carry(self.stream, opened.seen)
        except ProtocolViolation as error:
            opened.pipe.close()
            raise _StreamGone(f"{self.shown} can't go on: {error}") from None
        return opened.pipe


async def _meet(
    rendezvous: Rendezvous, places: Sequence[Endpoint], stream_id: bytes, received: int
) -> tuple[Endpoint, OpenedPipe]:
    """The first place where the tunnel answers. Raises Unreachable."""
    loop = asyncio.get_running_loop()
    handshake = TunnelHandshake(rendezvous.id, rendezvous.secret)
    end = loop.time() + CROWD_SECONDS
    while True:
        reasons: list[NoAnswer] = []
        for place in places:
            try:
                return place, await connect(place, handshake, stream_id, received)
            except NoAnswer as error:
                reasons.append(error)
        crowded = any(isinstance(reason, TurnedAway) for reason in reasons)
        if not crowded or loop.time() >= end:
            raise unreachable(rendezvous, reasons)
        await asyncio.sleep(CROWD_PAUSE_SECONDS)


async def _unless_moved(
    rendezvous_file: RendezvousFile, stamp: file.Stamp | None, attempt: Coroutine[Any, Any, T]
) -> T:
    """Return what the attempt brings. Raises Unreachable when the tunnel is meanwhile somewhere
    else."""
    trying = asyncio.ensure_future(attempt)
    moved = asyncio.ensure_future(rendezvous_file.changed(stamp))
    try:
        await asyncio.wait([trying, moved], return_when=asyncio.FIRST_COMPLETED)
        if not trying.done():
            raise Unreachable(f"the tunnel {rendezvous_file.name} is moving")
        return trying.result()
    finally:
        for task in (trying, moved):
            task.cancel()
        await asyncio.gather(trying, moved, return_exceptions=True)


def unreachable(rendezvous: Rendezvous, reasons: list[NoAnswer]) -> Unreachable:
    """The sentence that helps: the laptop sleeps, the tunnel ended, or it listens elsewhere."""
    name = rendezvous.name
    if any(isinstance(reason, Silent) for reason in reasons):
        return Unreachable(
            f"the laptop {name} does not answer: it sleeps or has no network; "
            "the mount goes on by itself when it is back"
        )
    here = socket.gethostname()
    if rendezvous.login_host and here.split(".")[0] != rendezvous.login_host.split(".")[0]:
        return Unreachable(
            f"the tunnel {name} can't be reached from {here}: it is on {rendezvous.login_host}. "
            "If it is up, start it on the laptop with --bind and an address of "
            f"{rendezvous.login_host} that {here} reaches"
        )
    why = "; ".join(dict.fromkeys(str(reason) for reason in reasons)) or "it names no place"
    return Unreachable(
        f"the tunnel {name} of {rendezvous.since} is not up any more ({why}): "
        "run 'hpcfs tunnel' on the laptop again"
    )
