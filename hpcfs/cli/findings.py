"""One result of `hpcfs check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A result. `fail` stops a mount or a namespace; `text` of a warning or failure says how to
    mend it."""

    level: Level
    subject: str
    text: str
