"""A TCP proxy that behaves like a wide-area link: delay, a shared rate, and nothing else.

    python -m scripts.benchmarks.wan --listen 2200 --to cluster:22 --rtt 20 --rate 1000

Each direction delays by half the round trip (ms) and carries the rate (Mbit/s, 0: no cap), which
all connections share; a new connection costs the round trip that the local accept hides. Not
emulated: loss, jitter, TCP's slow start and window limits. So one plain stream fills the link at
any distance, and capacity that a program leaves unused is its own doing.

Data read from a sender gets the time at which its last byte would leave a wire of that rate, plus
the delay, and is sent on at that time. Times in one direction only grow, so one queue per direction
holds all data in flight. No sender is read while the wire is booked for the next milliseconds:
unread bytes stay with the kernel, whose window then stops the sender. That also limits the
wake-ups, since the machine's few cores are shared with the server and the program under test. A
packet on an idle link is not delayed by a tick.

The wait is select() on a few epoll descriptors: select has microseconds where epoll has
milliseconds, and leaving one out pauses a whole direction without a system call.
"""

from __future__ import annotations

import argparse
import errno
import heapq
import os
import select
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

BUFFER_BYTES = 256 * 1024
SMALL_BYTES = 16 * 1024
"""Bytes up to which a copy costs less than a buffer that is held for the time of flight."""
BOOKED_SECONDS = 0.004
"""Seconds that the wire may be booked ahead; bulk data is read when half of that is free. A longer
time saves wake-ups and makes bulk data coarser."""
LATE_SECONDS = 0.05
"""Seconds that a wake-up may be late without reducing the rate: the processor was busy, not the
wire."""
SLACK_BYTES = 4 * 1024 * 1024
"""Bytes that a connection may have waiting for a slow receiver, beyond those in flight."""
FAST_WIRE = 1.25e9
"""Bytes per second, for the size of queues where no rate is set."""
EARLY_SECONDS = 0.0004
"""Seconds by which a wait may at most end early, to make up for late wake-ups."""
INFINITE = float("inf")
NICENESS = -10
"""The process's nice value, where permitted: a link does not slow down because the machines at its
ends are busy."""
LINGER_RESET = struct.pack("ii", 1, 0)
"""Closing sends a reset instead of a FIN."""


@dataclass(frozen=True)
class Profile:
    """The link's properties: `rtt` in seconds; `rate` in bytes per second and direction, 0 for no
    limit."""

    rtt: float = 0.0
    rate: float = 125e6

    @property
    def queue_bytes(self) -> int:
        return int((self.rate or FAST_WIRE) * self.rtt) + SLACK_BYTES


@dataclass(frozen=True)
class Mark:
    """An item in the queue among the data, which ends a stream."""

    name: str


FIN, RST = Mark("FIN"), Mark("RST")
Item = bytes | memoryview | Mark


@dataclass(eq=False)
class Pipe:
    """One direction of a connection."""

    wire: Wire
    source: socket.socket | None = None
    sink: socket.socket | None = None
    backlog: deque[Item] = field(default_factory=deque)
    """Data that has arrived, and was not yet taken by the sink."""
    unsent: int = 0
    """Bytes in flight and in the backlog."""
    blocked: bool = False
    watched: bool = False
    ended: bool = False
    """True when nothing more is read."""
    done: bool = False
    """True when nothing more is sent."""
    back: Pipe = field(init=False)


class Wire:
    """One direction of the link: the data in flight, and until when the wire is booked."""

    def __init__(self, profile: Profile) -> None:
        self._delay = profile.rtt / 2
        self._rate = profile.rate
        self._free_at = 0.0
        self.flight: deque[tuple[float, Pipe, Item]] = deque()
        self.readable = select.epoll()
        self.pipes: dict[int, Pipe] = {}
        """The pipes that are read, by the source's descriptor."""
        self.paused = False
        self.resumes_at = 0.0

    def room(self, now: float) -> int:
        """Return how many bytes may be read now, at least one."""
        if not self._rate:
            return 16 * BUFFER_BYTES
        return max(1, int((BOOKED_SECONDS + now - self._free_at) * self._rate))

    def pause(self, now: float) -> bool:
        """Return whether to wait before the next read; `resumes_at` is set to the end of the
        wait."""
        self.resumes_at = self._free_at - BOOKED_SECONDS / 2
        self.paused = self.resumes_at > now and bool(self.pipes) and self._rate > 0
        return self.paused

    def may_resume(self, now: float) -> bool:
        """Return whether reading may resume: a little early, where that saves a wake-up."""
        return self.resumes_at - BOOKED_SECONDS / 4 <= now

    def put(self, now: float, pipe: Pipe, item: Item) -> None:
        """Send data that was read at `now` or, on a paused wire, was waiting to be read."""
        if self._rate:
            length = 0 if isinstance(item, Mark) else len(item)
            since = now - LATE_SECONDS if self.paused else now
            self._free_at = max(self._free_at, since) + length / self._rate
            now = max(now, self._free_at)
        self.flight.append((now + self._delay, pipe, item))

    def watch(self, pipe: Pipe) -> None:
        if not (pipe.watched or pipe.ended or pipe.source is None):
            pipe.watched = True
            self.pipes[pipe.source.fileno()] = pipe
            self.readable.register(pipe.source.fileno(), select.EPOLLIN)

    def ignore(self, pipe: Pipe) -> None:
        if pipe.watched and pipe.source is not None:
            pipe.watched = False
            del self.pipes[pipe.source.fileno()]
            self.readable.unregister(pipe.source.fileno())


class Proxy:
    """Relays connections to `listener` until told to stop."""

    def __init__(self, listener: socket.socket, to: tuple[str, int], profile: Profile) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._to = to
        self._profile = profile
        self._up, self._down = self._wires = (Wire(profile), Wire(profile))
        self._writable = select.epoll()
        self._blocked: dict[int, Pipe] = {}
        """Blocked pipes by the descriptor of their sink."""
        self._connections: set[Pipe] = set()
        """The upward pipe of each connection."""
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timers_set = 0
        self._buffers: list[bytearray] = []

    def run(self, stop: int) -> None:
        """Relay until the descriptor `stop` can be read; then all connections are reset."""
        try:
            self._relay(stop)
        finally:
            for up in list(self._connections):
                self._close(up, reset=True)
            for epoll in (self._writable, *(wire.readable for wire in self._wires)):
                epoll.close()

    def _relay(self, stop: int) -> None:
        clock, wires = time.monotonic, self._wires
        writable, listener = self._writable.fileno(), self._listener.fileno()
        early = 0.0
        """Seconds by which waits end late on this machine: they are asked to end that much
        earlier."""
        while True:
            now = clock()
            watched = [stop, listener, writable]
            wake = self._next_event()
            for wire in wires:
                if wire.pause(now):
                    wake = min(wake, wire.resumes_at)
                else:
                    watched.append(wire.readable.fileno())
            ready = select.select(watched, (), (), self._timeout(wake - early, clock()))[0]
            now = clock()
            if not ready and wake < INFINITE:
                late = min(max(0.0, now - wake + early), EARLY_SECONDS)
                early += (late - early) / 8
            if ready:
                if stop in ready:
                    return
                if writable in ready:
                    self._unblock()
                if listener in ready:
                    self._accept(now)
            self._deliver(now + early)
            for wire in wires:
                if wire.readable.fileno() in ready or (wire.paused and wire.may_resume(now)):
                    self._read(wire, now)

    @staticmethod
    def _timeout(wake: float, now: float) -> float | None:
        return None if wake == INFINITE else max(0.0, wake - now)

    def _next_event(self) -> float:
        times = [wire.flight[0][0] for wire in self._wires if wire.flight]
        if self._timers:
            times.append(self._timers[0][0])
        return min(times, default=INFINITE)

    # --- reading and delivering -------------------------------------------------------------------

    def _read(self, wire: Wire, now: float) -> None:
        """Read all that may be read now, shared among the senders that have data."""
        ready = wire.readable.poll(0)
        for left, (fd, _) in zip(range(len(ready), 0, -1), ready, strict=True):
            pipe = wire.pipes[fd]
            length = min(BUFFER_BYTES, max(SMALL_BYTES, wire.room(now) // left))
            item = self._receive(pipe, length)
            if item is None:
                continue
            wire.put(now, pipe, item)
            if isinstance(item, Mark):
                pipe.ended = True
            else:
                pipe.unsent += len(item)
            if pipe.ended or pipe.unsent >= self._profile.queue_bytes:
                wire.ignore(pipe)

    def _receive(self, pipe: Pipe, length: int) -> Item | None:
        assert pipe.source is not None
        buffer = self._buffers.pop() if self._buffers else bytearray(BUFFER_BYTES)
        try:
            count = pipe.source.recv_into(buffer, length)
        except BlockingIOError:
            self._buffers.append(buffer)
            return None
        except OSError:
            self._buffers.append(buffer)
            return RST
        if count > SMALL_BYTES:
            return memoryview(buffer)[:count]
        self._buffers.append(buffer)
        return bytes(memoryview(buffer)[:count]) if count else FIN

    def _deliver(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        for wire in self._wires:
            while wire.flight and wire.flight[0][0] <= now:
                _, pipe, item = wire.flight.popleft()
                pipe.backlog.append(item)
                if item is RST:
                    self._close(pipe, reset=True)
                elif not pipe.blocked:
                    self._send(pipe)

    def _send(self, pipe: Pipe) -> None:
        while pipe.backlog and not pipe.done:
            item = pipe.backlog.popleft()
            if isinstance(item, Mark):
                self._finish(pipe)
                return
            assert pipe.sink is not None
            try:
                count = pipe.sink.send(item)
            except BlockingIOError:
                count = 0
            except OSError:
                self._lose(pipe)
                return
            pipe.unsent -= count
            if count < len(item):
                pipe.backlog.appendleft(item[count:])
                self._block(pipe)
                break
            if isinstance(item, memoryview):
                self._buffers.append(item.obj)  # type: ignore[arg-type]  # it is of a bytearray
        if pipe.unsent < self._profile.queue_bytes:
            pipe.wire.watch(pipe)

    def _block(self, pipe: Pipe) -> None:
        assert pipe.sink is not None
        pipe.blocked = True
        self._blocked[pipe.sink.fileno()] = pipe
        self._writable.register(pipe.sink.fileno(), select.EPOLLOUT)

    def _unblock(self) -> None:
        for fd, _ in self._writable.poll(0):
            pipe = self._blocked.pop(fd)
            self._writable.unregister(fd)
            pipe.blocked = False
            self._send(pipe)
            pipe.back.wire.watch(pipe.back)  # the sink may have been connected just now

    # --- connections ------------------------------------------------------------------------------

    def _accept(self, now: float) -> None:
        """Accept a connection. Its bytes arrive a round trip later; the server sees the connection
        after one and a half."""
        with suppress(BlockingIOError, ConnectionAbortedError):
            near, _ = self._listener.accept()
            _prepare(near)
            up = Pipe(self._up, source=near, blocked=True)
            down = Pipe(self._down, sink=near)
            up.back, down.back = down, up
            self._connections.add(up)
            self._at(now + self._profile.rtt, lambda: self._up.watch(up))
            self._at(now + self._profile.rtt * 1.5, lambda: self._connect(up, down))

    def _at(self, when: float, call: Callable[[], None]) -> None:
        self._timers_set += 1
        heapq.heappush(self._timers, (when, self._timers_set, call))

    def _connect(self, up: Pipe, down: Pipe) -> None:
        if up.done:
            return
        family = socket.AF_INET6 if ":" in self._to[0] else socket.AF_INET
        far = socket.socket(family, socket.SOCK_STREAM)
        _prepare(far)
        up.sink = down.source = far
        if far.connect_ex(self._to) in (0, errno.EINPROGRESS):
            self._block(up)  # the end of the attempt makes it writable
        else:
            self._close(up, reset=True)

    def _finish(self, pipe: Pipe) -> None:
        """Close half of the connection, since the sink has all data that was sent."""
        assert pipe.sink is not None
        pipe.done = True
        with suppress(OSError):  # the receiver is gone already
            pipe.sink.shutdown(socket.SHUT_WR)
        if pipe.back.done:
            self._close(pipe, reset=False)

    def _lose(self, pipe: Pipe) -> None:
        """Handle a receiver that is gone: the sender learns of it half a round trip later."""
        self._discard(pipe)
        back = pipe.back
        if not back.ended:
            back.ended = True
            back.wire.put(time.monotonic(), back, RST)
            back.wire.ignore(back)
        elif back.done:
            self._close(pipe, reset=True)

    def _discard(self, pipe: Pipe) -> None:
        pipe.done = pipe.ended = True
        pipe.wire.ignore(pipe)
        pipe.backlog.clear()
        if pipe.blocked and pipe.sink is not None:
            pipe.blocked = False
            del self._blocked[pipe.sink.fileno()]
            self._writable.unregister(pipe.sink.fileno())

    def _close(self, pipe: Pipe, *, reset: bool) -> None:
        self._discard(pipe)
        self._discard(pipe.back)
        self._connections -= {pipe, pipe.back}
        for end in (pipe.source, pipe.sink):
            if end is None:
                continue
            if reset:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            end.close()


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


# --- the process ----------------------------------------------------------------------------------


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    found = socket.getaddrinfo(host or "127.0.0.1", int(port), type=socket.SOCK_STREAM)
    return str(found[0][4][0]), int(found[0][4][1])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.benchmarks.wan", description="A TCP proxy with delay and a rate."
    )
    parser.add_argument("--listen", type=int, default=0, metavar="PORT", help="0: any free one")
    parser.add_argument("--to", type=_address, required=True, metavar="HOST:PORT")
    parser.add_argument("--rtt", type=float, default=20, metavar="MS", help="the round trip")
    parser.add_argument("--rate", type=float, default=1000, metavar="MBITS", help="0: no cap")
    parser.add_argument(
        "--until-stdin-ends", action="store_true", help="so that it ends with its parent"
    )
    return parser.parse_args()


def _stop_descriptor(until_stdin_ends: bool) -> int:
    """Return a descriptor that becomes readable once the process should end."""
    if until_stdin_ends:
        return sys.stdin.fileno()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    return reader


def main() -> None:
    arguments = _arguments()
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    listener = socket.create_server(("127.0.0.1", arguments.listen), backlog=128)
    stop = _stop_descriptor(arguments.until_stdin_ends)
    print(listener.getsockname()[1], flush=True)
    profile = Profile(rtt=arguments.rtt / 1e3, rate=arguments.rate * 1e6 / 8)
    Proxy(listener, arguments.to, profile).run(stop)


if __name__ == "__main__":
    main()
