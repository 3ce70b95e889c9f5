"""docs/troubleshooting.md quotes messages: each must be one that a user can really see."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
OTHERS = ("Package fuse3 was not found", "fuse.h: No such file", "Python.h: No such file")
"""What pkg-config and the C compiler say."""


def quoted_messages() -> list[str]:
    """The first part of every entry, cut where it has "...", without the values around it."""
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    heads = re.findall(r"^- (.*?)\n  - Meaning: ", text, re.DOTALL | re.MULTILINE)
    messages = [found for head in heads for found in re.findall(r"`([^`]+)`", head)]
    parts = [part.strip(" ():?") for message in messages for part in message.split("...")]
    return [part for part in parts if len(part) > 3 and part not in OTHERS]


@pytest.fixture(scope="module")
def program_text() -> str:
    """All sources, with strings over several lines joined and values replaced."""
    sources = [*sorted((REPOSITORY / "hpcfs").rglob("*.py")), REPOSITORY / "scripts" / "setup.sh"]
    text = "\n".join(source.read_text() for source in sources)
    text = re.sub(r'"\s*\n\s*f?"', "", text)
    system = [os.strerror(number) for number in errno.errorcode]
    text = text.replace("`", "'").replace("{device}", "/dev/fuse")
    return "\n".join([text, *system])


def test_there_are_messages() -> None:
    assert len(quoted_messages()) > 40


@pytest.mark.parametrize("message", quoted_messages())
def test_the_program_says_it(message: str, program_text: str) -> None:
    assert message in program_text
