"""Answers of an SFTP server, changed: some are nonsense, some are lies in good form.

Most changes know what an answer is made of (numbers, strings, counts, attributes), so that they get
past the first check; the others change bits anywhere. Nothing that a change claims is made: a
length of 4 GiB costs nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from asyncssh.constants import (
    FXP_ATTRS,
    FXP_DATA,
    FXP_EXTENDED_REPLY,
    FXP_HANDLE,
    FXP_NAME,
    FXP_STATUS,
    FXP_VERSION,
)
from asyncssh.packet import String, UInt32

from tests.support.sftp_in_memory import with_length

NUMBERS = (0, 1, 2, 3, 127, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
TYPES = (FXP_STATUS, FXP_HANDLE, FXP_DATA, FXP_NAME, FXP_ATTRS, FXP_EXTENDED_REPLY, FXP_VERSION)
CODES = (*range(32), 255, 2**31, 2**32 - 1)
STRINGS = (
    b"", b".", b"..", b"/", b"a/b", b"../up", b"nul\0nul", b"x" * 256, b"y" * 5000, b"\xff\xfe",
    b"\x1b]0;x\x07", b"new\nline", b"%n%s%x", "ü".encode(), b" ",
)  # fmt: skip
BODY = 9
"""Where an answer's body begins: after its length, type and number."""
LARGEST = 4 * 1024 * 1024
"""What no client takes for one message."""


@dataclass(frozen=True)
class Changed:
    """What is sent in the place of one answer. Where the lengths of messages are still right, each
    request is answered or its channel ends; where they are not, answers may be lost."""

    sent: bytes
    is_framed: bool = True
    how: str = ""


class Mutator:
    """Changes answers, by its own luck; `earlier` answers come back in the place of others."""

    def __init__(self, luck: random.Random) -> None:
        self._luck = luck
        self._earlier: list[bytes] = []
        self._ways: tuple[Callable[[bytes], Changed], ...] = (
            self._bits,
            self._bytes,
            self._number,
            self._number,
            self._number,
            self._string,
            self._string,
            self._status,
            self._type,
            self._shorter,
            self._longer,
            self._id,
            self._twice,
            self._swapped,
            self._noise,
            self._cut,
            self._length,
            self._unasked,
            self._large,
        )

    def change(self, answer: bytes) -> Changed:
        """Change one answer, with its length."""
        self._remember(answer)
        way = self._luck.choice(self._ways)
        if len(answer) <= BODY:
            way = self._bits
        done = way(answer)
        return Changed(done.sent, done.is_framed, way.__name__.strip("_"))

    def _remember(self, answer: bytes) -> None:
        if len(self._earlier) < 200:
            self._earlier.append(answer)
        else:
            self._earlier[self._luck.randrange(200)] = answer

    # --- changes that keep the length of the message right ---

    def _bits(self, answer: bytes) -> Changed:
        twisted = bytearray(answer)
        for _ in range(self._luck.randrange(1, 5)):
            twisted[self._luck.randrange(4, len(twisted))] ^= 1 << self._luck.randrange(8)
        return Changed(bytes(twisted))

    def _bytes(self, answer: bytes) -> Changed:
        twisted = bytearray(answer)
        for _ in range(self._luck.randrange(1, 5)):
            twisted[self._luck.randrange(4, len(twisted))] = self._luck.getrandbits(8)
        return Changed(bytes(twisted))

    def _number(self, answer: bytes) -> Changed:
        """A field of four bytes: a count, a length, a flag, a size, a time."""
        at = self._luck.choice(_fields(answer))
        number = self._luck.choice(NUMBERS)
        if self._luck.random() < 0.3:
            old = int.from_bytes(answer[at : at + 4], "big")
            number = max(0, old + self._luck.choice((-4, -1, 1, 4))) & (2**32 - 1)
        return Changed(answer[:at] + UInt32(number) + answer[at + 4 :])

    def _string(self, answer: bytes) -> Changed:
        """A string, with its length: a handle, a name, some bytes of a file."""
        strings = [at for at in _fields(answer) if _is_string(answer, at)]
        if not strings:
            return self._number(answer)
        at = self._luck.choice(strings)
        end = at + 4 + int.from_bytes(answer[at : at + 4], "big")
        return _body(answer, answer[BODY:at] + String(self._luck.choice(STRINGS)) + answer[end:])

    def _status(self, answer: bytes) -> Changed:
        words = self._luck.choice(STRINGS), self._luck.choice(STRINGS[:6])
        body = UInt32(self._luck.choice(CODES)) + b"".join(map(String, words))
        body = body[: self._luck.choice((4, len(body), len(body)))]
        return Changed(with_length(bytes([FXP_STATUS]) + answer[5:BODY] + body))

    def _type(self, answer: bytes) -> Changed:
        kind = self._luck.choice((*TYPES, self._luck.getrandbits(8)))
        return Changed(answer[:4] + bytes([kind]) + answer[5:])

    def _shorter(self, answer: bytes) -> Changed:
        return Changed(with_length(answer[4 : self._luck.randrange(BODY, len(answer))]))

    def _longer(self, answer: bytes) -> Changed:
        return _body(answer, answer[BODY:] + self._luck.randbytes(self._luck.randrange(1, 60)))

    def _id(self, answer: bytes) -> Changed:
        number = int.from_bytes(answer[5:BODY], "big") + self._luck.choice((-2, -1, 1, 2, 10**6))
        return Changed(answer[:5] + UInt32(number & (2**32 - 1)) + answer[BODY:])

    def _twice(self, answer: bytes) -> Changed:
        return Changed(answer * self._luck.choice((2, 2, 3, 50)))

    def _swapped(self, answer: bytes) -> Changed:
        other = self._luck.choice(self._earlier)
        return Changed(other[:5] + answer[5:BODY] + other[BODY:])

    def _noise(self, answer: bytes) -> Changed:
        return _body(answer, self._luck.randbytes(self._luck.randrange(80)))

    def _unasked(self, answer: bytes) -> Changed:
        return Changed(answer + self._luck.choice(self._earlier))

    def _large(self, answer: bytes) -> Changed:
        """A body of kilobytes: names without end, words, bytes that nobody asked for."""
        return _body(answer, answer[BODY:] * self._luck.choice((10, 100)))

    # --- and those that do not ---

    def _cut(self, answer: bytes) -> Changed:
        return Changed(answer[: self._luck.randrange(len(answer))], is_framed=False)

    def _length(self, answer: bytes) -> Changed:
        lengths = (0, 1, 4, 5, len(answer), LARGEST, LARGEST + 1, 2**31, 2**32 - 1, 20_000)
        return Changed(UInt32(self._luck.choice(lengths)) + answer[4:], is_framed=False)


def _body(answer: bytes, body: bytes) -> Changed:
    return Changed(with_length(answer[4:BODY] + body))


def _is_string(answer: bytes, at: int) -> bool:
    return at + 4 + int.from_bytes(answer[at : at + 4], "big") <= len(answer)


def _fields(answer: bytes) -> list[int]:
    """Where numbers and lengths begin, of an answer in good form; at least one."""
    kind, end = answer[4], len(answer)
    at = BODY
    found = [at]
    if kind == FXP_NAME:
        at += 4
        while at + 8 <= end and len(found) < 200:
            for _ in range(2):
                found.append(at)
                at += 4 + int.from_bytes(answer[at : at + 4], "big")
            has_attrs = at + 4 <= end and answer[at : at + 4] == b"\0\0\0\x0f"
            found += range(at, at + 32 if has_attrs else at + 4, 4)
            at += 32 if has_attrs else 4
    elif kind == FXP_VERSION:
        found = [5]
        while at + 4 <= end:
            found.append(at)
            at += 4 + int.from_bytes(answer[at : at + 4], "big")
    elif kind in (FXP_ATTRS, FXP_EXTENDED_REPLY):
        found += range(at, end - 3, 4)
    elif kind == FXP_STATUS and end >= BODY + 8:
        second = BODY + 8 + int.from_bytes(answer[BODY + 4 : BODY + 8], "big")
        found += [BODY + 4, second]
    return [one for one in found if one + 4 <= end] or [5]
