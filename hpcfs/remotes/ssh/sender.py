"""Sends half as many packets: leaves out the empty ones that protect nothing.

Before each packet asyncssh sends an empty SSH_MSG_IGNORE, against an attack on ciphers in CBC mode
whose next initialisation vector can be predicted (RFC 4251, section 9.3.1). AES-GCM and
ChaCha20-Poly1305 have no such vector. For small requests each of them costs as much as the request:
a quarter of the process's time for 500 small files.

This leans on names inside of asyncssh: `shorten_sending` looks for them and leaves everything as it
is where one is missing; a test fails when that happens.
"""

from __future__ import annotations

from typing import Any

import asyncssh
from asyncssh.constants import MSG_IGNORE
from asyncssh.encryption import ChachaEncryption, GCMEncryption

NAMES = ("_send_encryption", "send_packet")


def shorten_sending(connection: asyncssh.SSHClientConnection) -> bool:
    """Leave out empty packets from now on where they protect nothing; returns whether it can be
    done."""
    inside: Any = connection
    if not all(hasattr(connection, name) for name in NAMES):
        return False
    send = inside.send_packet

    def send_packet(pkttype: int, *args: bytes, handler: Any = None) -> None:
        authenticated = isinstance(inside._send_encryption, GCMEncryption | ChachaEncryption)
        if pkttype != MSG_IGNORE or not authenticated:
            send(pkttype, *args, handler=handler)

    inside.send_packet = send_packet
    return True
