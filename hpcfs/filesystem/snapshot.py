"""What an upload brings to the remote, taken at one moment while writing may go on."""

from __future__ import annotations

from dataclasses import dataclass

from hpcfs.cache.ranges import RangeSet
from hpcfs.transfer import messages as m


@dataclass(frozen=True)
class Snapshot:
    """Sizes in bytes. `base_size` is how much of the remote's old content still counts; `resized`
    says that the size changed otherwise than by writing; `sent` is what the remote has already,
    under `handle`."""

    ranges: RangeSet
    size: int
    base_size: int
    attributes: m.Attributes
    resized: bool
    sent: RangeSet
    handle: int


def merge_attributes(older: m.Attributes, newer: m.Attributes) -> m.Attributes:
    """The newer values where both have one."""
    return m.Attributes(
        **{
            field: getattr(older, field) if value is None else value
            for field in m.Attributes.__struct_fields__
            for value in [getattr(newer, field)]
        }
    )
