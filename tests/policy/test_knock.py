"""The first words on a pipe of a tunnel: who does not know its secret learns and does nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from hpcfs.tunnel.knock import GREETING, NONCE_BYTES, OPENING, SEALED_BYTES, TunnelHandshake
from hpcfs.tunnel.stream import ProtocolViolation

DOOR = TunnelHandshake("a" * 32, "5" * 64)
ID = bytes(range(16))
NONCES = b"s" * NONCE_BYTES + b"c" * NONCE_BYTES


def test_both_ends_understand_each_other() -> None:
    nonce = b"n" * NONCE_BYTES
    line = DOOR.greeting(nonce)
    assert line.startswith(GREETING + b"a" * 32)
    assert line.endswith(b"\n")
    assert DOOR.nonce_in(line[:-1]) == nonce
    for who in (b"client", b"server"):
        assert DOOR.unseal(who, NONCES, DOOR.seal(who, NONCES, ID, 2**63)) == (ID, 2**63)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2p1",
        GREETING + b"a" * 32,
        GREETING + b"b" * 32 + b" " + b"0" * 32,
        GREETING + b"a" * 32 + b" " + b"0" * 31,
        GREETING + b"a" * 32 + b" " + b"0" * 33,
        GREETING + b"a" * 32 + b" " + b"x" * 32,
        GREETING + b"a" * 32 + b" " + b"\xff" * 32,
        GREETING + b"a" * 32 + b"  " + b"0" * 32,
        b"HPCFS-TUNNEL/1 " + b"a" * 32,
    ],
)
def test_another_greeting_is_not_taken_for_ours(line: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        DOOR.nonce_in(line)


@pytest.mark.parametrize(
    ("who", "nonces", "handshake"),
    [
        (b"server", NONCES, DOOR),
        (b"client", NONCES[:-1] + b"d", DOOR),
        (b"client", b"t" + NONCES[1:], DOOR),
        (b"client", NONCES, TunnelHandshake("b" * 32, "5" * 64)),
        (b"client", NONCES, TunnelHandshake("a" * 32, "6" * 64)),
    ],
    ids=["sent back", "to another mount", "said again", "another tunnel", "another secret"],
)
def test_words_are_good_for_one_conversation(
    who: bytes, nonces: bytes, handshake: TunnelHandshake
) -> None:
    said = DOOR.seal(b"client", NONCES, ID, 7)
    with pytest.raises(ProtocolViolation, match="secret"):
        handshake.unseal(who, nonces, said)


@given(st.integers(0, SEALED_BYTES * 8 - 1))
def test_no_bit_of_it_can_be_changed(bit: int) -> None:
    said = bytearray(DOOR.seal(b"client", NONCES, ID, 7))
    said[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolViolation):
        DOOR.unseal(b"client", NONCES, bytes(said))


@given(st.binary(max_size=2 * SEALED_BYTES))
def test_noise_proves_nothing(noise: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        DOOR.unseal(b"client", NONCES, noise)


def test_the_streams_id_is_not_seen_from_outside() -> None:
    """Nor whether it is the same as in another conversation."""
    plain = OPENING.pack(ID, 7)
    said = [DOOR.seal(b"client", NONCES[:-1] + bytes([number]), ID, 7) for number in range(20)]
    assert all(plain[start : start + 4] not in one for one in said for start in range(20))
    assert len({one[: OPENING.size] for one in said}) == len(said)
    assert DOOR.secret not in repr(DOOR)
