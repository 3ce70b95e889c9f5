"""The emulated link of the benchmarks: what it delays, what it caps, and what it passes on.

Lower bounds are exact, since no byte may be early; upper ones leave room for a busy machine.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from scripts.benchmarks.wan import SLACK_BYTES, Profile, Proxy

LOOPBACK = "127.0.0.1"
RTT = 0.04
BUSY = 0.2
"""How much later than on an idle machine things may happen."""
EARLY = 0.001
"""The proxy makes up for late wake-ups of the system, by less than this."""


@contextmanager
def proxied(profile: Profile, server: socket.socket) -> Iterator[Callable[[], socket.socket]]:
    """Calls make connections through the link; all are closed at the end."""
    reader, writer = os.pipe()
    with socket.create_server((LOOPBACK, 0)) as listener, ExitStack() as opened:
        proxy = Proxy(listener, server.getsockname(), profile)
        thread = threading.Thread(target=proxy.run, args=(reader,))
        thread.start()

        def connect() -> socket.socket:
            return opened.enter_context(socket.create_connection(listener.getsockname(), 10))

        try:
            yield connect
        finally:
            os.write(writer, b"x")
            thread.join(10)
            os.close(reader)
            os.close(writer)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server((LOOPBACK, 0)) as listener:
        listener.settimeout(10)
        yield listener


def accept(server: socket.socket) -> socket.socket:
    accepted, _ = server.accept()
    accepted.settimeout(10)
    return accepted


def answer(client: socket.socket, far: socket.socket) -> float:
    """How long a byte takes there and back."""
    started = time.monotonic()
    client.sendall(b"?")
    assert far.recv(1) == b"?"
    far.sendall(b"!")
    assert client.recv(1) == b"!"
    return time.monotonic() - started


def read_all(source: socket.socket) -> int:
    count = 0
    while data := source.recv(1 << 20):
        count += len(data)
    return count


def test_a_byte_takes_the_round_trip_and_a_connection_one_more(server: socket.socket) -> None:
    with proxied(Profile(rtt=RTT), server) as connect:
        started = time.monotonic()
        client = connect()
        client.sendall(b"?")
        with accept(server) as far:
            reached = time.monotonic() - started
            assert far.recv(1) == b"?"
            times = [answer(client, far) for _ in range(5)]
    assert 1.5 * RTT - EARLY <= reached <= 1.5 * RTT + BUSY
    assert RTT - EARLY <= min(times) <= RTT + BUSY


def test_bytes_arrive_whole_and_in_order(server: socket.socket) -> None:
    sent = os.urandom(3_000_000)
    with proxied(Profile(rtt=RTT / 4), server) as connect:
        client = connect()
        sender = threading.Thread(target=client.sendall, args=(sent,))
        sender.start()
        with accept(server) as far:
            received = b""
            while len(received) < len(sent):
                received += far.recv(1 << 20)
        sender.join(10)
    assert received == sent


@pytest.mark.parametrize("connections", [1, 4])
def test_all_connections_share_the_rate(server: socket.socket, connections: int) -> None:
    rate, size = 20e6, 4_000_000
    with proxied(Profile(rtt=0.002, rate=rate), server) as connect, ExitStack() as opened:
        clients = [connect() for _ in range(connections)]
        fars = [opened.enter_context(accept(server)) for _ in clients]
        started = time.monotonic()
        for far in fars:
            threading.Thread(target=send_and_close, args=(far, size // connections)).start()
        assert sum(map(read_all, clients)) == size
        took = time.monotonic() - started
    assert size / rate * 0.97 <= took <= size / rate + BUSY


def send_and_close(sink: socket.socket, size: int) -> None:
    sink.sendall(bytes(size))
    sink.shutdown(socket.SHUT_WR)


def test_the_directions_do_not_share_the_rate(server: socket.socket) -> None:
    rate, size = 20e6, 2_000_000
    with proxied(Profile(rtt=0.002, rate=rate), server) as connect:
        client = connect()
        with accept(server) as far:
            started = time.monotonic()
            for end in (client, far):
                threading.Thread(target=send_and_close, args=(end, size)).start()
            readers = [threading.Thread(target=read_all, args=(end,)) for end in (client, far)]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join(10)
            took = time.monotonic() - started
    assert took < 2 * size / rate * 0.95


def test_half_of_a_connection_can_be_closed(server: socket.socket) -> None:
    with proxied(Profile(rtt=RTT / 4), server) as connect:
        client = connect()
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        with accept(server) as far:
            assert far.recv(100) == b"question"
            assert far.recv(100) == b""
            far.sendall(b"answer")
        assert client.recv(100) == b"answer"
        assert client.recv(100) == b""


@pytest.mark.parametrize("who", ["client", "server"])
def test_a_reset_is_passed_on(server: socket.socket, who: str) -> None:
    with proxied(Profile(rtt=RTT / 4), server) as connect:
        client = connect()
        far = accept(server)
        answer(client, far)
        breaks, notices = (client, far) if who == "client" else (far, client)
        breaks.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        breaks.close()
        with pytest.raises(ConnectionResetError):
            notices.recv(1)
        far.close()


def test_a_refused_connection_is_reset() -> None:
    with socket.socket() as nobody:
        nobody.bind((LOOPBACK, 0))  # and does not listen
        with proxied(Profile(rtt=RTT / 4), nobody) as connect:
            client = connect()
            with pytest.raises(ConnectionResetError):
                client.recv(1)


def test_a_sender_waits_for_a_receiver_that_does_not_read(server: socket.socket) -> None:
    """The kernel's buffers of two connections come on top of the proxy's own."""
    kernel_bytes = 4 * 8 * 2**20
    with proxied(Profile(rtt=0.002, rate=0), server) as connect:
        client = connect()
        with accept(server):
            client.setblocking(False)
            sent = 0
            while select.select([], [client], [], 0.2)[1]:
                sent += client.send(bytes(1 << 20))
                assert sent < SLACK_BYTES + 1.25e9 * 0.002 + kernel_bytes
    assert sent > SLACK_BYTES


def test_clients_that_are_done_before_the_server_is_connected(server: socket.socket) -> None:
    """Many, since whether the end is there before the connection is a matter of microseconds."""
    with proxied(Profile(rtt=RTT / 4), server) as connect:
        clients = [connect() for _ in range(50)]
        for client in clients:
            client.sendall(b"early")
            client.shutdown(socket.SHUT_WR)
        for _ in clients:
            with accept(server) as far:
                assert far.recv(100) == b"early"
                assert far.recv(100) == b""
                far.sendall(b"late")
        assert [client.recv(100) for client in clients] == [b"late"] * len(clients)
