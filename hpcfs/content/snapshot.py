"""The part of a file that one upload brings, taken at one moment while writing may go on."""

from __future__ import annotations

from dataclasses import dataclass

from hpcfs.cache.ranges import RangeSet
from hpcfs.model.entries import Attributes


@dataclass(frozen=True)
class SentPieces:
    """The byte ranges that were sent while the file was written, under an open `handle` of the
    remote; or no range, and the handle under which the remote made the file (NO_HANDLE: none)."""

    ranges: RangeSet
    handle: int


@dataclass(frozen=True)
class Snapshot:
    """What an upload brings; sizes are bytes.

    `ranges` are all dirty ones, those of `pieces` included. `base_size` is how much of the remote's
    old content still counts. With `append` the ranges go to the end that the remote's file has.
    """

    ranges: RangeSet
    size: int
    base_size: int
    attributes: Attributes
    pieces: SentPieces
    append: bool
