"""The first message between kernel and daemon: only the limits in it are replaced."""

from __future__ import annotations

import struct

from hpcfs.kernel.handshake import MAX_BACKGROUND, most_background, with_limits

_ANSWER = struct.Struct("=IiQIIIIHHIIHHI28x")
"""struct fuse_out_header and struct fuse_init_out of linux/fuse.h."""


def test_the_limits_are_replaced_and_nothing_else() -> None:
    before = (_ANSWER.size, 0, 2, 7, 38, 131072, 0xF0F0, 12, 9, 1 << 20, 1, 256, 0, 5)
    after = list(before)
    after[7:9] = MAX_BACKGROUND, MAX_BACKGROUND
    assert _ANSWER.size == 80
    assert _ANSWER.unpack(with_limits(_ANSWER.pack(*before))) == tuple(after)


def test_a_refusal_stays_as_it_is() -> None:
    refusal = struct.pack("=IiQ", 16, -71, 2)
    assert with_limits(refusal) == refusal


def test_what_a_user_may_have_is_bounded() -> None:
    assert 0 < most_background() <= MAX_BACKGROUND
