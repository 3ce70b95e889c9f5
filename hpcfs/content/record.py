"""The journal's row of one file: what the remote has not confirmed of it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hpcfs.model.capabilities import Capabilities
from hpcfs.model.entries import Attributes, Entry


class Unconfirmed(
    msgspec.Struct, frozen=True, omit_defaults=True, rename={"capabilities": "abilities"}
):
    """A file that the remote has not confirmed.

    `name` is its cache file's, `data` the path of its bytes, `origin` names the remote folder
    across mounts. `ranges` are the dirty (start, end) pairs in bytes, extended to whole blocks:
    outside of them, and below `base_size`, the bytes of the remote's `version` count. `entry` is
    what the mount shows, `pending` what is to be set besides times. The flags are Content's: the
    remote has no such file yet (`new`), it was open and
    more was to come (`writing`), what has the name there is to be replaced in one step
    (`replace`), an upload may have begun to write (`attempted`), the size changed (`resized`),
    what is dirty was appended, and belongs to the remote's end (`appended`).
    `reason` is empty while nothing was refused.
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

    @property
    def is_kept(self) -> bool:
        return Path(self.data).parent.name == "kept"
