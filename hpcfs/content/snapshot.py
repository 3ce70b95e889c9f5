"""What an upload brings to the remote, taken at one moment while writing may go on."""

from __future__ import annotations

from dataclasses import dataclass

from hpcfs.cache.ranges import RangeSet
from hpcfs.model.entries import Attributes


@dataclass(frozen=True)
class Snapshot:
    """Sizes in bytes. `base_size` is how much of the remote's old content still counts; `sent` is
    what the remote has already, under `handle`; with `append` the ranges go to the remote's end."""

    ranges: RangeSet
    size: int
    base_size: int
    attributes: Attributes
    sent: RangeSet
    handle: int
    append: bool
