"""Reading READDIR's answers in one go gives what reading them field by field does, or nothing."""

from __future__ import annotations

from asyncssh import SFTPAttrs, SFTPName
from asyncssh.packet import SSHPacket, UInt32
from hypothesis import given, settings, strategies as st

from hpcfs.remotes.sftp.name_reply import usual_names

repeatable = settings(deadline=None, derandomize=True, database=None)
numbers = st.integers(0, 2**32 - 1)
usual = st.builds(
    SFTPAttrs,
    size=st.integers(0, 2**64 - 1),
    uid=numbers,
    gid=numbers,
    permissions=st.integers(0x1000, 2**16 - 1),
    atime=numbers,
    mtime=numbers,
)
other = st.builds(SFTPAttrs, size=st.none() | numbers, permissions=st.none() | numbers) | st.builds(
    SFTPAttrs, extended=st.just([(b"acl@example.org", b"\0\0\0\1")])
)
texts = st.binary(max_size=300)
FIELDS = ("size", "uid", "gid", "permissions", "atime", "mtime")


def message(names: list[SFTPName]) -> bytes:
    return bytes(UInt32(len(names)) + b"".join(name.encode(3) for name in names))


@repeatable
@given(st.lists(st.builds(SFTPName, texts, texts, usual), max_size=20))
def test_usual_names_are_read_as_field_by_field(names: list[SFTPName]) -> None:
    payload = message(names)
    packet = SSHPacket(payload)
    assert packet.get_uint32() == len(names)
    slowly = [SFTPName.decode(packet, 3) for _ in names]
    found = usual_names(payload)
    assert found is not None
    assert [name for name, _ in found] == [name.filename for name in slowly]
    for (_, attrs), name in zip(found, slowly, strict=True):
        for field in FIELDS:
            assert getattr(attrs, field) == getattr(name.attrs, field)


@repeatable
@given(st.lists(st.builds(SFTPName, texts, texts, usual)), st.builds(SFTPName, texts, texts, other))
def test_others_are_left_to_who_reads_field_by_field(names: list[SFTPName], odd: SFTPName) -> None:
    assert usual_names(message([*names, odd])) is None


@repeatable
@given(st.lists(st.builds(SFTPName, texts, texts, usual), min_size=1, max_size=3), st.data())
def test_what_is_cut_or_longer_is_no_message(names: list[SFTPName], data: st.DataObject) -> None:
    payload = message(names)
    assert usual_names(payload[: data.draw(st.integers(0, len(payload) - 1))]) is None
    assert usual_names(payload + b"\0") is None


@repeatable
@given(st.binary(max_size=200))
def test_nonsense_is_no_message(payload: bytes) -> None:
    found = usual_names(payload)
    assert found is None or payload[:4] == len(found).to_bytes(4, "big")
