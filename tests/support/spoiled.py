"""Answers of an S3 server, damaged in all the ways that networks, proxies and wicked servers do.

Pure: the same generator gives the same damage. `spoil` takes a whole answer, head and body.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

STATUSES = (
    *(100, 101, 199, 200, 201, 204, 206, 300, 301, 302, 304, 307, 308, 400, 401, 403, 404, 405),
    *(408, 409, 411, 412, 413, 416, 418, 429, 500, 501, 502, 503, 504, 507, 520, 599, 600, 999),
)
VALUES = (
    *("", "0", "-1", "1", "x", "nan", "9" * 30, "9" * 5000, "1e9", "0x10", "null", " ", "\t"),
    *('"', '""', '"0"', "bytes", "bytes 0-0/1", "bytes 5-3/9", "bytes */*", "chunked", "gzip"),
    *("Mon, 99 Foo 2024 99:99:99 GMT", "0001-01-01T00:00:00Z", "٣", "ü" * 50, "../..", "a" * 40000),
    *("text/html", "http://127.0.0.1:1/", "true", "TRUE", "=?UTF-8?B?????=", "a=b; c"),
)
HEADERS = (
    *("content-length", "content-range", "content-type", "etag", "last-modified", "date"),
    *("transfer-encoding", "content-encoding", "location", "connection", "retry-after"),
    *("x-amz-bucket-region", "x-amz-meta-mode", "x-amz-meta-mtime", "x-amz-meta-uid"),
    *("x-amz-checksum-crc32", "x-amz-checksum-sha256", "x-amz-tagging-count", "expires"),
    *("x-amz-object-lock-retain-until-date", "x-amz-server-side-encryption-bucket-key-enabled"),
)
CODES = (
    *("InternalError", "SlowDown", "NoSuchKey", "NoSuchUpload", "PreconditionFailed", "X"),
    *("NotImplemented", "MethodNotAllowed", "RequestTimeout", "InvalidPart", "EntityTooSmall"),
)
PAGE = b"<!doctype html><html><head><title>Log in</title></head><body>Log in<br></body></html>"
XHTML = b"<html><head><title>Log in</title></head><body><p>Log in</p></body></html>"


def _parts(answer: bytes) -> tuple[bytes, list[bytes], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    return first, lines, body


def _joined(first: bytes, lines: list[bytes], body: bytes) -> bytes:
    return b"\r\n".join([first, *lines, b"", b""]) + body


def _sized(first: bytes, lines: list[bytes], body: bytes) -> bytes:
    """With the length that the body has."""
    drop = (b"content-length:", b"transfer-encoding:")
    kept = [line for line in lines if not line.lower().startswith(drop)]
    return _joined(first, [*kept, b"Content-Length: %d" % len(body)], body)


def _value(random: Random) -> bytes:
    return random.choice(VALUES).encode()


def status(random: Random, answer: bytes) -> bytes:
    _, lines, body = _parts(answer)
    return _joined(b"HTTP/1.1 %03d Spoiled" % random.choice(STATUSES), lines, body)


def refusal(random: Random, answer: bytes) -> bytes:
    _, lines, _ = _parts(answer)
    body = f"<Error><Code>{random.choice(CODES)}</Code><Message>m</Message></Error>".encode()
    return _sized(b"HTTP/1.1 %03d Spoiled" % random.choice(STATUSES), lines, body)


def header(random: Random, answer: bytes) -> bytes:
    first, lines, body = _parts(answer)
    index = random.randrange(len(lines)) if lines else 0
    name = lines[index].partition(b":")[0] if lines else b"x"
    change = random.randrange(5)
    if change == 0 and lines:
        del lines[index]
    elif change == 1 and lines:
        lines[index] = name + b": " + _value(random)
    elif change == 2:
        lines.insert(index, name + b": " + _value(random))
    elif change == 3:
        lines.append(random.choice(HEADERS).encode() + b": " + _value(random))
    else:
        lines.insert(index, random.randbytes(random.randrange(1, 40)))
    return _joined(first, lines, body)


def flipped(random: Random, answer: bytes) -> bytes:
    """Bits of the body."""
    first, lines, body = _parts(answer)
    changed = bytearray(body)
    for _ in range(random.randrange(1, 4)):
        if changed:
            changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return _joined(first, lines, bytes(changed))


def anywhere(random: Random, answer: bytes) -> bytes:
    """Bytes of the head, too, replaced, inserted or taken away."""
    changed = bytearray(answer)
    for _ in range(random.randrange(1, 6)):
        at = random.randrange(len(changed) + 1)
        end = at + random.randrange(8)
        changed[at:end] = random.randbytes(random.randrange(8))
    return bytes(changed)


def cut(random: Random, answer: bytes) -> bytes:
    return answer[: random.randrange(len(answer))]


def shorter(random: Random, answer: bytes) -> bytes:
    first, lines, body = _parts(answer)
    return _sized(first, lines, body[: random.randrange(len(body) + 1)])


def longer(random: Random, answer: bytes) -> bytes:
    first, lines, body = _parts(answer)
    more = body + random.randbytes(random.choice((1, 100, 70_000)))
    return _joined(first, lines, more) if random.random() < 0.5 else _sized(first, lines, more)


def page(random: Random, answer: bytes) -> bytes:
    kind = random.choice((b"text/html", b"text/html; charset=utf-8", b"application/xml"))
    return _sized(b"HTTP/1.1 200 OK", [b"Content-Type: " + kind], random.choice((PAGE, XHTML)))


def element(random: Random, answer: bytes) -> bytes:
    """An element of the XML: with another text, gone, twice, or around all the rest."""
    first, lines, body = _parts(answer)
    found = list(re.finditer(rb"<(\w+)>([^<]*)</\1>", body))
    if not found:
        return header(random, answer)
    one = random.choice(found)
    tag = one[1]
    text = random.choice((*VALUES[:24], "&#0;", "&e;", "<a>" * 50, "%", "%ff", "]]>"))
    new = random.choice(
        (
            b"<%s>%s</%s>" % (tag, text.encode(), tag),
            b"",
            one[0] * 2,
            one[0] * 1000,
            b"<%s>%s" % (tag, one[2]),
            b"<%s/>" % tag,
            b"<x>%s</x>" % one[0],
        )
    )
    return _sized(first, lines, body[: one.start()] + new + body[one.end() :])


def other_xml(random: Random, answer: bytes) -> bytes:
    first, lines, _ = _parts(answer)
    bodies = (
        *(b"", b"<", b"<a/>", b"<Error/>", b"<ListBucketResult/>", b"<CopyObjectResult/>"),
        *(b"<a>" * 5000, b"\0" * 50, b"{}", b"null", b"\xff\xfe<\0a\0/\0>\0"),
        b"<!DOCTYPE a [<!ENTITY e 'x'>]><a>&e;</a>",
        b"<Error><Code>InternalError</Code></Error>",
        b"<InitiateMultipartUploadResult><UploadId/></InitiateMultipartUploadResult>",
        b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>",
        b"<DeleteResult><Error><Key>k</Key></Error></DeleteResult>",
    )
    return _sized(first, lines, random.choice(bodies))


def chunks(random: Random, answer: bytes) -> bytes:
    """The body in chunks, framed well or not."""
    first, lines, body = _parts(answer)
    kept = [line for line in lines if not line.lower().startswith(b"content-length:")]
    sizes = (b"%x", b"%x;a=b", b"0x%x", b"-%x", b"%xg", b" %x", b"%x" + b"0" * 20)
    size = random.choice(sizes) if random.random() < 0.6 else sizes[0]
    at = random.randrange(len(body) + 1)
    framed = b""
    for piece in (body[:at], body[at:]):
        if piece:
            off = random.choice((0, 0, 0, 1, -1))
            framed += size % max(0, len(piece) + off) + b"\r\n" + piece + b"\r\n"
    end = random.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"", b"0\r\na: b\r\n\r\n", b"0\r\n\r\nmore"))
    return _joined(first, [*kept, b"Transfer-Encoding: chunked"], framed + end)


def nonsense(random: Random, answer: bytes) -> bytes:
    return random.choice(
        (
            b"",
            b"\r\n\r\n",
            b"SSH-2.0-x\r\n",
            random.randbytes(random.randrange(1, 3000)),
            b"HTTP/1.1 100 Continue\r\n\r\n" * random.choice((1, 300)) + answer,
            b"HTTP/1.0" + answer[8:],
            b"HTTP/2" + answer[8:],
            answer * 2,
            b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 9000 + b"\r\n",
            answer.replace(b"\r\n", b"\n"),
        )
    )


WAYS: tuple[Callable[[Random, bytes], bytes], ...] = (
    *(status, refusal, header, header, flipped, anywhere, cut, shorter, longer, page),
    *(element, element, other_xml, chunks, nonsense),
)


def spoil(random: Random, answer: bytes) -> bytes:
    """Damage an answer in one way, sometimes in two."""
    for _ in range(1 if random.random() < 0.8 else 2):
        answer = random.choice(WAYS)(random, answer) if answer else answer
    return answer
