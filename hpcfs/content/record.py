"""The journal's row of one file: what the remote has not confirmed of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypedDict

import msgspec
import xxhash

from hpcfs.content.state import Changes, RemoteSide, State, Unsent
from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Attributes, Entry

log = logging.getLogger(__name__)

_SUM_BYTES = 8


class Unconfirmed(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"capabilities": "abilities"}
):
    """A file that the remote has not confirmed.

    `name` is its cache file's, `data` the path of its bytes, `origin` names the remote folder
    across mounts. `ranges` are the dirty (start, end) pairs in bytes, extended to whole blocks:
    outside of them, and below `base_size`, the bytes of the remote's `version` count. `entry` is
    what the mount shows, `pending` what is to be set besides times. The flags tell the states of
    the file (content/state.py): nothing of the remote's counts (`new`), what has the name there is
    to be replaced in one step (`replace`), an upload may have begun to write (`attempted`), the
    size changed (`resized`), what is dirty was appended, and belongs to the remote's end
    (`appended`). It was open and more was to come (`writing`). `reason` is empty while nothing was
    refused. `sums` has checksums of the blocks of `ranges` (content/sums.py), as far as they are
    known. Names and meaning are those of a format: journals outlive the version of hpcfs.
    """

    name: str
    namespace: str
    origin: str
    path: bytes
    size: int
    base_size: int
    ranges: list[tuple[int, int]]
    data: str
    version: bytes
    entry: Entry
    capabilities: Capabilities
    pending: Attributes = Attributes()
    new: bool = False
    replace: bool = False
    resized: bool = False
    attempted: bool = False
    appended: bool = False
    writing: bool = False
    reason: str = ""
    since: float = 0.0
    sums: bytes = b""

    @property
    def is_stranded(self) -> bool:
        """Whether its bytes were moved to kept/: the mount does not show the file."""
        return Path(self.data).parent.name == "kept"

    @property
    def remote_side(self) -> RemoteSide:
        """What the remote has of the file as far as the mount knew that noted this."""
        if self.replace:
            return RemoteSide.REPLACES
        if self.attempted:
            return RemoteSide.PARTIAL
        return RemoteSide.ABSENT if self.new else RemoteSide.PRESENT

    @property
    def unsent(self) -> Unsent:
        """What an upload brings beside bytes."""
        if self.resized:
            changes = Changes.RESIZED
        elif not self.ranges and self.remote_side is RemoteSide.PRESENT:
            changes = Changes.NONE  # noted before the first byte was written, and none was
        else:
            changes = Changes.APPENDED if self.appended and not self.new else Changes.ANY
        return Unsent(changes, self.pending)


def pack(row: Unconfirmed) -> bytes:
    """Pack a row for the journal: 8 bytes, the xxh3_64 of what follows (little-endian), and the row
    as MessagePack."""
    payload = msgspec.msgpack.encode(row)
    return _sum(payload) + payload


def unpack(packed: bytes) -> tuple[Unconfirmed | None, bool]:
    """Return a row, as far as it can be decoded, and whether its checksum is right."""
    payload = packed[_SUM_BYTES:]
    return decode(payload), packed[:_SUM_BYTES] == _sum(payload)


def decode(payload: bytes) -> Unconfirmed | None:
    """Return the row of a journal of format 1, which had no checksums; None if it is damaged."""
    try:
        return msgspec.msgpack.decode(payload, type=Unconfirmed)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        log.info("a row of the journal can't be decoded: %s", error)
        return None


def _sum(payload: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(payload).to_bytes(_SUM_BYTES, "little")


class Flags(TypedDict):
    """The fields of a row that tell a file's states."""

    pending: Attributes
    new: bool
    replace: bool
    resized: bool
    attempted: bool
    appended: bool


def flags_of(state: State, base_size: int) -> Flags:
    """Of a file of which `base_size` bytes of the remote's content still count."""
    remote, unsent = state.remote, state.unconfirmed
    is_partial = remote is RemoteSide.PARTIAL
    is_begun_anew = is_partial and not base_size and unsent.changes is not Changes.APPENDED
    return Flags(
        pending=unsent.attributes,
        new=remote in (RemoteSide.ABSENT, RemoteSide.REPLACES) or is_begun_anew,
        replace=remote is RemoteSide.REPLACES,
        resized=unsent.changes is Changes.RESIZED,
        attempted=is_partial or remote is RemoteSide.CREATED or state.taken is not None,
        appended=unsent.changes is Changes.APPENDED,
    )
