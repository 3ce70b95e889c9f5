"""Reads the login node's /proc (proc(5)) over SFTP: who listens, file systems, its name.

An sshd that may not bind the requested address binds loopback without saying so.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from contextlib import suppress
from typing import Any

import asyncssh

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
LISTENING = "0A"
READ_BYTES = 64 * 1024
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Host names of hostname(7). The name goes into the tunnel's file, and from there to people."""
MAX_TABLE_BYTES = 8 * 1024 * 1024


async def addresses(sftp: asyncssh.SFTPClient, port: int) -> list[Address] | None:
    """Return the addresses on which that port is listened to; None where /proc can't be read."""
    found: list[Address] = []
    told = False
    for table in TABLES:
        try:
            text = await _read(sftp, table)
        except asyncssh.SFTPError:  # no /proc in a chroot
            continue
        told = told or bool(text)
        found += listeners(text, port)
    return found if told else None


def listeners(table: str, port: int) -> list[Address]:
    """Parse a table of /proc/net/tcp. Malformed lines are skipped: a server may send anything."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 3 and fields[3] == LISTENING:
            address, _, number = fields[1].partition(":")
            with suppress(ValueError, struct.error):
                if int(number, 16) == port:
                    found.append(_address(address))
    return found


async def filesystem(sftp: asyncssh.SFTPClient, path: str) -> str:
    """Return the type of the file system that holds this path there (proc_mounts(5)); empty where
    unknown."""
    try:
        text = await _read(sftp, "/proc/mounts")
    except asyncssh.SFTPError:
        return ""
    best, kind = "", ""
    for line in text.splitlines():
        fields = line.split(" ")
        inside = len(fields) > 2 and f"{path}/".startswith(f"{fields[1].rstrip('/')}/")
        if inside and len(fields[1]) >= len(best):
            best, kind = fields[1], fields[2]
    return kind


async def host_name(sftp: asyncssh.SFTPClient) -> str:
    """Return the login node's own name, as gethostname(2) does; empty where unknown. One host name
    may lead to several login nodes, and the tunnel is on one of them."""
    try:
        told = (await _read(sftp, "/proc/sys/kernel/hostname")).strip()
    except asyncssh.SFTPError:
        return ""
    return told if _HOST_NAME.fullmatch(told) else ""


def _address(text: str) -> Address:
    """Parse an address. The kernel prints each 32-bit word in its processor's byte order:
    little-endian, on clusters."""
    raw = bytes.fromhex(text)
    words = struct.unpack(f"<{len(raw) // 4}I", raw)
    packed = struct.pack(f">{len(words)}I", *words)
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


async def _read(sftp: asyncssh.SFTPClient, path: str) -> str:
    """Read a file of /proc. It has no size: it ends where no more bytes come."""
    text = b""
    file: Any
    async with sftp.open(path, "rb", encoding=None) as file:
        while chunk := await file.read(READ_BYTES, len(text)):
            text += chunk
            if len(text) > MAX_TABLE_BYTES:
                break
    return text.decode("ascii", "replace")
