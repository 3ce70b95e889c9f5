"""A link to a server that can be cut, frozen and mended: a TCP relay on a loopback port.

Cut: connections end at once and new ones are refused, as when a cable router or a VPN goes down
loudly. Frozen: connections stay, new ones are accepted, and nothing arrives any more, as when
packets are lost. Deaf: what is asked arrives, and no answer comes back. Bytes are counted, so that
a link can go down in the middle of a transfer.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from tests.support.sshd import LOOPBACK, SshServer

State = Literal["up", "deaf", "frozen", "cut"]
_CHUNK = 64 * 1024
_SLOW_CHUNK = 1024


class Link:
    """`port` leads to the server at `target`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.accepted = 0
        """Connections so far."""
        self.relayed = 0
        """Bytes in both directions since the last `fail_after`."""
        self.rate: float | None = None
        """Bytes per second that pass in each direction of each connection; None: all."""
        self._limit: int | None = None
        self._then: State = "cut"
        self._state: State = "up"
        self._changed = threading.Condition()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listener.getsockname()[1]
        self._spawn(self._accept_all)

    # --- what tests do ----------------------------------------------------------------------------

    def cut(self) -> None:
        self._become("cut")

    def freeze(self) -> None:
        self._become("frozen")

    def deafen(self) -> None:
        self._become("deaf")

    def mend(self) -> None:
        self._limit = None
        self._become("up")

    def fail_after(self, count: int, then: State = "cut") -> None:
        """Go down once so many more bytes have passed."""
        with self._changed:
            self.relayed, self._limit, self._then = 0, count, then

    def lose_answers_after(self, count: int) -> None:
        """Bring nothing back any more once so many more bytes have passed, until it is mended."""
        self.fail_after(count, then="deaf")

    @property
    def is_down(self) -> bool:
        return self._state != "up"

    def close(self) -> None:
        self._become("cut")
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(10)

    # --- relaying ---------------------------------------------------------------------------------

    def _become(self, state: State) -> None:
        with self._changed:
            self._state = state
            if state == "cut":
                for one in self._sockets:
                    with suppress(OSError):
                        one.shutdown(socket.SHUT_RDWR)
            self._changed.notify_all()

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept_all(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return  # closed
            if self._state == "cut" or (far := self._connect()) is None:
                near.close()
                continue
            self.accepted += 1
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._changed:
                self._sockets |= {near, far}
            done = threading.Barrier(2)
            self._spawn(self._relay, near, far, done, ("frozen",))
            self._spawn(self._relay, far, near, done, ("frozen", "deaf"))

    def _connect(self) -> socket.socket | None:
        try:
            return socket.create_connection((LOOPBACK, self.target), timeout=None)
        except OSError:
            return None

    def _relay(
        self,
        source: socket.socket,
        sink: socket.socket,
        done: threading.Barrier,
        held_while: tuple[State, ...],
    ) -> None:
        with suppress(OSError):
            while chunk := source.recv(_CHUNK if self.rate is None else _SLOW_CHUNK):
                self._wait_until_it_may_pass(len(chunk), held_while)
                if self.rate is not None:
                    time.sleep(len(chunk) / self.rate)
                sink.sendall(chunk)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
        done.wait()
        with self._changed:
            self._sockets.discard(source)
        source.close()

    def _wait_until_it_may_pass(self, count: int, held_while: tuple[State, ...]) -> None:
        with self._changed:
            self.relayed += count
            fails = self._limit is not None and self.relayed > self._limit
        if fails:
            self._limit = None
            self._become(self._then)
        with self._changed:
            self._changed.wait_for(lambda: self._state not in held_while)
        if self._state == "cut":
            raise ConnectionAbortedError


@contextmanager
def link_to(port: int) -> Iterator[Link]:
    link = Link(port)
    try:
        yield link
    finally:
        link.close()


def ssh_config_through(link: Link, server: SshServer) -> str:
    """The text of an ssh_config whose "cluster" is reached over the link, its key known."""
    (server.directory / "known_hosts").write_text(
        server.known_hosts_line(server.host_key)
        + server.known_hosts_line(server.host_key).replace(f":{server.port} ", f":{link.port} ")
    )
    return server.config_text().replace(f"Port {server.port}", f"Port {link.port}")
