"""The seam's messages: each survives the wire, secrets don't show, limits hold."""

from __future__ import annotations

import msgspec
import pytest

from hpcfs.model.entries import BLOCK_BYTES, LIST_PAGE_ENTRIES, Attributes, Entry
from hpcfs.model.errors import ProtocolError
from hpcfs.model.sites import S3Root, S3Site, Secret, SiteSpec
from hpcfs.model.uploads import PIECE_BYTES, UploadPieceRequest, UploadRequest
from hpcfs.protocol import messages as m

ATTRIBUTES = Attributes(mode=0o640, mtime_ns=-1, xattrs={b"user.\xff": b"\0", b"user.b": None})
NAME = b"h\xe4user/\xff"
REQUESTS: list[m.Request] = [
    m.Connect(),
    m.Stat(NAME),
    m.StatOpen(2**60),
    m.List(b""),
    m.ReadLink(NAME),
    m.Fetch(NAME, b"\0v", 2**62, BLOCK_BYTES, "/cache/f", 7, growing=True),
    m.Release(7),
    m.Upload(
        UploadRequest(NAME, 2**62, 0, [(0, 1), (2**61, 5)], ATTRIBUTES, 0o644, sync=True),
        "/cache/f",
    ),
    m.ReadUnsized(NAME, 2**40, 2**20, 5),
    m.Create(NAME, 0o7777),
    m.UploadPiece(UploadPieceRequest(NAME, PIECE_BYTES, PIECE_BYTES, 0o600, 5, b"v"), "/cache/f"),
    m.MakeDirectory(NAME, 0o755),
    m.MakeSymlink(NAME, b"\xff/.."),
    m.MakeLink(NAME, b"b"),
    m.Rename(NAME, b"b", replace=False),
    m.Remove(NAME),
    m.RemoveDirectory(NAME),
    m.SetAttributes(NAME, ATTRIBUTES),
    m.Truncate(NAME, 2**62),
    m.CheckWritable(NAME),
    m.GetDiskUsage(),
    m.GetTraffic(),
]


def _over_the_wire(message: msgspec.Struct, kind: object) -> object:
    framed = m.frame(message)
    (length,) = m.FRAME_HEADER.unpack_from(framed)
    assert length == len(framed) - m.FRAME_HEADER.size
    return msgspec.msgpack.decode(framed[m.FRAME_HEADER.size :], type=kind)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_a_request_arrives_as_it_was_sent(request_: m.Request) -> None:
    call = m.Call(3, "ns", request_)
    assert _over_the_wire(call, m.ToWorker) == call


def test_every_request_was_tried() -> None:
    assert {type(request) for request in REQUESTS} == set(m.Request.__args__)


@pytest.mark.parametrize(
    "message",
    [
        m.Reply(1, m.pack([1, 2]), more=True),
        m.Reply(1, failure=m.Failure("Changed", "why")),
        m.Advance(1, 2**40),
        m.Question(1, "Password: ", echo=False),
    ],
    ids=lambda message: type(message).__name__,
)
def test_an_answer_arrives_as_it_was_sent(message: msgspec.Struct) -> None:
    assert _over_the_wire(message, m.FromWorker) == message


def test_an_answer_without_result_is_none() -> None:
    reply = _over_the_wire(m.Reply(1), m.FromWorker)
    assert isinstance(reply, m.Reply)
    assert msgspec.msgpack.decode(reply.result, type=type(None)) is None


def test_a_secret_never_shows() -> None:
    secret = Secret("hunter2")
    site = S3Site(access_key=secret, secret_key=secret)
    start = m.Start(SiteSpec(site, {"ns": S3Root("bucket")}, "/cache", 1, 1))
    for thing in (secret, site, start, m.Answer(1, secret)):
        assert "hunter2" not in f"{thing!r} {thing!s}"
    assert _over_the_wire(start, m.Start) == start


def test_a_frame_has_a_limit() -> None:
    with pytest.raises(ProtocolError, match="larger than"):
        m.frame(m.Call(1, "ns", m.Stat(bytes(m.MAX_FRAME_BYTES))))


def test_attributes_are_true_if_any_is_set_even_to_zero() -> None:
    assert not Attributes()
    for field in Attributes.__struct_fields__:
        assert Attributes(**{field: 0})


def test_a_page_of_the_longest_names_fits_into_a_frame() -> None:
    entry = Entry(b"n" * 255, 2**31, 2**62, 2**62, 2**62, 2**31, 2**31, b"v" * 100)
    assert m.frame(m.Reply(1, m.pack([entry] * LIST_PAGE_ENTRIES), more=True))
