"""One result of `hpcfs check`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`fail` would stop a mount or a namespace; `text` of a warn or fail says what to do."""

    level: Level
    subject: str
    text: str
