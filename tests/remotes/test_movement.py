"""What moves between a worker process and its site, as the kernel and the channels tell."""

from __future__ import annotations

import socket

from hpcfs.model.usage import Traffic
from hpcfs.worker.movement import Movement
from tests.support.sshd import LOOPBACK


def test_bytes_of_tcp_connections_count_in_both_directions() -> None:
    with socket.create_server((LOOPBACK, 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            movement = Movement(Traffic)
            movement.take()
            near.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(far.recv(left))
            assert movement.take() == 200_000, "each end is in this process, and counts once"
            assert movement.take() == 0
        movement.take()
        assert movement.take() == 0, "what was closed does not count backwards"


def test_what_comes_over_other_channels_counts() -> None:
    received = 5_000_000
    movement = Movement(lambda: Traffic(received=received))
    movement.take()
    received += 70_000
    assert movement.take() == 70_000
    received = 10  # another session
    assert movement.take() == 10
