"""What the login node tells of itself in /proc (see proc(5)), read over SFTP.

An sshd that may not bind the address it was asked for binds loopback and does not say so.
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
"""hostname(7). It goes into the tunnel's file, and from there to people."""
MAX_TABLE_BYTES = 8 * 1024 * 1024


async def addresses(sftp: asyncssh.SFTPClient, port: int) -> list[Address] | None:
    """None where the login node does not tell."""
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
    """Lines that make no sense are left out: a server may tell what it likes."""
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
    """The type of the file system that holds this path there (proc_mounts(5)); empty where that is
    not told."""
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
    """What the login node calls itself, as gethostname(2) does; empty where that is not told. One
    name may lead to several login nodes, and the tunnel is on one of them."""
    try:
        told = (await _read(sftp, "/proc/sys/kernel/hostname")).strip()
    except asyncssh.SFTPError:
        return ""
    return told if _HOST_NAME.fullmatch(told) else ""


def _address(text: str) -> Address:
    """The kernel prints each 32 bits as its processor has them: little-endian, on clusters."""
    raw = bytes.fromhex(text)
    words = struct.unpack(f"<{len(raw) // 4}I", raw)
    packed = struct.pack(f">{len(words)}I", *words)
    address = ipaddress.ip_address(packed)
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


async def _read(sftp: asyncssh.SFTPClient, path: str) -> str:
    """Such a file has no size: it ends where nothing more comes."""
    text = b""
    file: Any
    async with sftp.open(path, "rb", encoding=None) as file:
        while chunk := await file.read(READ_BYTES, len(text)):
            text += chunk
            if len(text) > MAX_TABLE_BYTES:
                break
    return text.decode("ascii", "replace")
