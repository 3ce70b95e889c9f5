"""An SFTP server of version 3 in memory, without a connection: a request in, its answer out.

It answers as OpenSSH's sftp-server does (draft-ietf-secsh-filexfer-02, and PROTOCOL of OpenSSH for
the extensions): the same types, flags, codes and words. It serves one user, who may do everything.
"""

from __future__ import annotations

import itertools
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from asyncssh.constants import (
    FX_BAD_MESSAGE,
    FX_EOF,
    FX_FAILURE,
    FX_NO_SUCH_FILE,
    FX_OK,
    FX_OP_UNSUPPORTED,
    FXF_APPEND,
    FXF_CREAT,
    FXF_EXCL,
    FXF_TRUNC,
    FXP_ATTRS,
    FXP_CLOSE,
    FXP_DATA,
    FXP_EXTENDED,
    FXP_EXTENDED_REPLY,
    FXP_FSETSTAT,
    FXP_FSTAT,
    FXP_HANDLE,
    FXP_INIT,
    FXP_LSTAT,
    FXP_MKDIR,
    FXP_NAME,
    FXP_OPEN,
    FXP_OPENDIR,
    FXP_READ,
    FXP_READDIR,
    FXP_READLINK,
    FXP_REALPATH,
    FXP_REMOVE,
    FXP_RENAME,
    FXP_RMDIR,
    FXP_SETSTAT,
    FXP_STAT,
    FXP_STATUS,
    FXP_SYMLINK,
    FXP_VERSION,
    FXP_WRITE,
)
from asyncssh.packet import SSHPacket, String, UInt32, UInt64

HOME = b"/home/tester"
UID = 1000
NAMES_AT_ONCE = 100
MOST_BYTES = 261_120
EXTENSIONS = (
    (b"posix-rename@openssh.com", b"1"),
    (b"statvfs@openssh.com", b"2"),
    (b"fstatvfs@openssh.com", b"2"),
    (b"hardlink@openssh.com", b"1"),
    (b"fsync@openssh.com", b"1"),
    (b"lsetstat@openssh.com", b"1"),
    (b"limits@openssh.com", b"1"),
)
_WORDS = {
    FX_OK: b"Success",
    FX_EOF: b"End of file",
    FX_NO_SUCH_FILE: b"No such file",
    FX_FAILURE: b"Failure",
    FX_BAD_MESSAGE: b"Bad message",
    FX_OP_UNSUPPORTED: b"Operation unsupported",
}


class Refused(Exception):
    """Raised with an SFTP error code for a request that is not carried out."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass
class Node:
    """One file, directory or link; a link's data is its target."""

    mode: int
    data: bytearray = field(default_factory=bytearray)
    mtime: int = 1_700_000_000

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


@dataclass
class _Open:
    node: Node
    appends: bool = False
    names: list[tuple[bytes, Node]] = field(default_factory=list)


class MemoryServer:
    """`nodes` are what is there, by absolute path; `twist` changes answers, given the kind of their
    request."""

    def __init__(self) -> None:
        self.twist: Callable[[int, bytes], bytes] = lambda kind, answer: answer
        self.nodes: dict[bytes, Node] = {}
        for path in (b"/", b"/home", HOME):
            self.nodes[path] = Node(stat.S_IFDIR | 0o755)
        self._open: dict[bytes, _Open] = {}
        self._numbers = itertools.count()
        self._answers: dict[int, Callable[[SSHPacket], bytes]] = {
            FXP_OPEN: self._open_file,
            FXP_CLOSE: self._close,
            FXP_READ: self._read,
            FXP_WRITE: self._write,
            FXP_LSTAT: lambda packet: _attrs(self._at(packet.get_string())),
            FXP_STAT: lambda packet: _attrs(self._at(packet.get_string(), follow=True)),
            FXP_FSTAT: lambda packet: _attrs(self._held(packet).node),
            FXP_SETSTAT: lambda packet: self._set(
                self._at(packet.get_string(), follow=True), packet
            ),
            FXP_FSETSTAT: lambda packet: self._set(self._held(packet).node, packet),
            FXP_OPENDIR: self._open_directory,
            FXP_READDIR: self._read_directory,
            FXP_REMOVE: self._remove,
            FXP_MKDIR: self._make_directory,
            FXP_RMDIR: self._remove_directory,
            FXP_REALPATH: lambda packet: _names([(self._real(packet.get_string()), None)]),
            FXP_RENAME: self._rename,
            FXP_READLINK: self._read_link,
            FXP_SYMLINK: self._symlink,
            FXP_EXTENDED: self._extended,
        }
        self._extensions: dict[bytes, Callable[[SSHPacket], bytes]] = {
            b"posix-rename@openssh.com": self._replace,
            b"statvfs@openssh.com": lambda _: _USAGE,
            b"hardlink@openssh.com": self._link,
            b"fsync@openssh.com": lambda packet: _status(FX_OK),
            b"lsetstat@openssh.com": lambda packet: self._set(
                self._at(packet.get_string()), packet
            ),
            b"limits@openssh.com": lambda _: _LIMITS,
        }

    def answer(self, request: bytes) -> bytes:
        """Return the answer to one request, both with their length."""
        return self.twist(request[4], self._answer(request))

    def _answer(self, request: bytes) -> bytes:
        packet = SSHPacket(request[4:])
        kind = packet.get_byte()
        if kind == FXP_INIT:
            names = b"".join(String(name) + String(data) for name, data in EXTENSIONS)
            return with_length(bytes([FXP_VERSION]) + UInt32(3) + names)
        number = packet.get_bytes(4)
        try:
            body = self._answers[kind](packet)
        except Refused as refused:
            body = _status(refused.code)
        return with_length(body[:1] + number + body[1:])

    def put(self, path: bytes, data: bytes) -> None:
        """Make or replace a file."""
        self.nodes[path] = Node(stat.S_IFREG | 0o644, bytearray(data))

    # --- paths ------------------------------------------------------------------------------------

    def _real(self, path: bytes) -> bytes:
        path = path if path.startswith(b"/") else HOME + b"/" + path
        names: list[bytes] = []
        for name in path.split(b"/"):
            if name == b"..":
                names = names[:-1]
            elif name not in (b"", b"."):
                names.append(name)
        return b"/" + b"/".join(names)

    def _at(self, path: bytes, *, follow: bool = False) -> Node:
        node = self.nodes.get(self._real(path))
        if node is not None and follow and stat.S_ISLNK(node.mode):
            node = self.nodes.get(self._real(_parent(self._real(path)) + b"/" + node.data))
        if node is None:
            raise Refused(FX_NO_SUCH_FILE)
        return node

    def _new(self, packet: SSHPacket) -> bytes:
        """A path at which nothing is."""
        path = self._real(packet.get_string())
        if path in self.nodes:
            raise Refused(FX_FAILURE)
        if not self._at(_parent(path)).is_directory:
            raise Refused(FX_NO_SUCH_FILE)
        return path

    def _held(self, packet: SSHPacket) -> _Open:
        held = self._open.get(packet.get_string())
        if held is None:
            raise Refused(FX_FAILURE)
        return held

    def _below(self, path: bytes) -> list[bytes]:
        top = path.rstrip(b"/") + b"/"
        return [one for one in self.nodes if one.startswith(top) and one != path]

    def _hand_out(self, held: _Open) -> bytes:
        handle = UInt32(next(self._numbers))
        self._open[handle] = held
        return bytes([FXP_HANDLE]) + String(handle)

    # --- files ------------------------------------------------------------------------------------

    def _open_file(self, packet: SSHPacket) -> bytes:
        path, flags = packet.get_string(), packet.get_uint32()
        real = self._real(path)
        if real in self.nodes and flags & FXF_EXCL:
            raise Refused(FX_FAILURE)
        if real not in self.nodes and flags & FXF_CREAT:
            if not self._at(_parent(real)).is_directory:
                raise Refused(FX_NO_SUCH_FILE)
            self.nodes[real] = Node(stat.S_IFREG | 0o644)
            self._set(self.nodes[real], packet)
        node = self._at(path, follow=True)
        if node.is_directory:
            raise Refused(FX_FAILURE)
        if flags & FXF_TRUNC:
            node.data.clear()
        return self._hand_out(_Open(node, bool(flags & FXF_APPEND)))

    def _close(self, packet: SSHPacket) -> bytes:
        return _status(FX_OK if self._open.pop(packet.get_string(), None) else FX_FAILURE)

    def _read(self, packet: SSHPacket) -> bytes:
        node, offset, length = self._held(packet).node, packet.get_uint64(), packet.get_uint32()
        data = bytes(node.data[offset : offset + min(length, MOST_BYTES)])
        if not data:
            raise Refused(FX_EOF)
        return bytes([FXP_DATA]) + String(data)

    def _write(self, packet: SSHPacket) -> bytes:
        held, offset, data = self._held(packet), packet.get_uint64(), packet.get_string()
        content = held.node.data
        at = len(content) if held.appends else offset
        content.extend(bytes(max(0, at - len(content))))
        content[at : at + len(data)] = data
        return _status(FX_OK)

    def _set(self, node: Node, packet: SSHPacket) -> bytes:
        flags = packet.get_uint32()
        if flags & 0x1:
            size = packet.get_uint64()
            if size > 1 << 30:
                raise Refused(FX_FAILURE)
            del node.data[size:]
            node.data.extend(bytes(size - len(node.data)))
        if flags & 0x2:
            packet.get_bytes(8)
        if flags & 0x4:
            node.mode = stat.S_IFMT(node.mode) | packet.get_uint32() & 0o7777
        if flags & 0x8:
            packet.get_uint32()
            node.mtime = packet.get_uint32()
        return _status(FX_OK)

    # --- directories and names --------------------------------------------------------------------

    def _open_directory(self, packet: SSHPacket) -> bytes:
        path = self._real(packet.get_string())
        if not self._at(path).is_directory:
            raise Refused(FX_NO_SUCH_FILE)
        inside = [one for one in self._below(path) if _parent(one) == path]
        names = [(one.rpartition(b"/")[2], self.nodes[one]) for one in inside]
        dots = [(b".", self.nodes[path]), (b"..", self.nodes[_parent(path)])]
        return self._hand_out(_Open(self.nodes[path], names=dots + names))

    def _read_directory(self, packet: SSHPacket) -> bytes:
        held = self._held(packet)
        some, held.names = held.names[:NAMES_AT_ONCE], held.names[NAMES_AT_ONCE:]
        if not some:
            raise Refused(FX_EOF)
        return _names(some)

    def _remove(self, packet: SSHPacket) -> bytes:
        path = self._real(packet.get_string())
        if self._at(path).is_directory:
            raise Refused(FX_FAILURE)
        del self.nodes[path]
        return _status(FX_OK)

    def _make_directory(self, packet: SSHPacket) -> bytes:
        self.nodes[self._new(packet)] = made = Node(stat.S_IFDIR | 0o755)
        return self._set(made, packet)

    def _remove_directory(self, packet: SSHPacket) -> bytes:
        path = self._real(packet.get_string())
        if not self._at(path).is_directory or self._below(path):
            raise Refused(FX_FAILURE)
        del self.nodes[path]
        return _status(FX_OK)

    def _rename(self, packet: SSHPacket) -> bytes:
        source = self._real(packet.get_string())
        return self._move(source, self._new(packet))

    def _replace(self, packet: SSHPacket) -> bytes:
        source, target = (self._real(packet.get_string()) for _ in range(2))
        if self._below(target) or (target in self.nodes and self.nodes[target].is_directory):
            raise Refused(FX_FAILURE)
        self._at(_parent(target))
        return self._move(source, target)

    def _move(self, source: bytes, target: bytes) -> bytes:
        self._at(source)
        for path in [*self._below(source), source]:
            self.nodes[target + path[len(source) :]] = self.nodes.pop(path)
        return _status(FX_OK)

    def _link(self, packet: SSHPacket) -> bytes:
        node = self._at(packet.get_string())
        self.nodes[self._new(packet)] = node
        return _status(FX_OK)

    def _read_link(self, packet: SSHPacket) -> bytes:
        node = self._at(packet.get_string())
        if not stat.S_ISLNK(node.mode):
            raise Refused(FX_BAD_MESSAGE)
        return _names([(bytes(node.data), None)])

    def _symlink(self, packet: SSHPacket) -> bytes:
        """OpenSSH reads the target first."""
        target = packet.get_string()
        self.nodes[self._new(packet)] = Node(stat.S_IFLNK | 0o777, bytearray(target))
        return _status(FX_OK)

    def _extended(self, packet: SSHPacket) -> bytes:
        answer = self._extensions.get(packet.get_string())
        if answer is None:
            raise Refused(FX_OP_UNSUPPORTED)
        return answer(packet)


def with_length(body: bytes) -> bytes:
    return UInt32(len(body)) + body


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or b"/"


def _status(code: int) -> bytes:
    return bytes([FXP_STATUS]) + UInt32(code) + String(_WORDS[code]) + String(b"")


def _told(node: Node) -> bytes:
    numbers = 0xF, len(node.data), UID, UID, node.mode, node.mtime, node.mtime
    return struct.pack(">IQIIIII", *numbers)


def _attrs(node: Node) -> bytes:
    return bytes([FXP_ATTRS]) + _told(node)


def _names(names: Sequence[tuple[bytes, Node | None]]) -> bytes:
    told = []
    for name, node in names:
        line = name if node is None else stat.filemode(node.mode).encode() + b"    1 u g 0 " + name
        told.append(String(name) + String(line) + (UInt32(0) if node is None else _told(node)))
    return bytes([FXP_NAME]) + UInt32(len(told)) + b"".join(told)


_LIMITS = bytes([FXP_EXTENDED_REPLY]) + b"".join(
    map(UInt64, (262_144, MOST_BYTES, MOST_BYTES, 1019))
)
_USAGE = bytes([FXP_EXTENDED_REPLY]) + b"".join(
    map(UInt64, (4096, 4096, 10**6, 10**5, 10**5, 10**6, 10**5, 10**5, 7, 0, 255))
)
