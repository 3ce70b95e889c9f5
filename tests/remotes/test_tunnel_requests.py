"""A mount that asks the laptop for anything: each request is answered or ends the channel, and
nothing outside of the writable share changes."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcfs.laptop.channel import HandleTable, ServerChannel
from hpcfs.laptop.sftp_server import Shares
from hpcfs.laptop.shares import Share
from tests.support.wicked import Packets, packet, string

REQUESTS = 1500
INIT = struct.pack(">IBI", 5, 1, 3)
PATHS = [
    b"/rw/file", b"/ro/file", b"/rw", b"/ro", b"/", b"", b".", b"..", b"/rw/../ro/file",
    b"/rw/dir/../../secret", b"//rw//file", b"/rw/./file", b"/rw/file/", b"/rw/file/x",
    b"/rw/" + b"x" * 256, b"/rw/" + b"a/" * 2000, b"/secret", b"/rw/\xff\xfe", b"/rw/\x1b[31m",
    b"/rw/new", b"/ro/new", b"/rw/dir", b"/../ro/file", b"/rw/..", b"/ro/..", b"/ro/.",
    b"/rw/dir/..", b"\0", b"/rw/\n", b"/rw/out", b"/rw/shared",
]  # fmt: skip
HANDLES = [(1).to_bytes(8, "big"), (2).to_bytes(8, "big"), b"", b"x", b"\xff" * 8, b"h" * 300]
OFFSETS = [0, 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
LENGTHS = [0, 1, 100, 2**20, 2**31, 2**32 - 1]
FLAGS = [1, 2, 3, 8, 10, 26, 42, 58, 63, 0, 2**32 - 1]
NAMES = [
    b"posix-rename@openssh.com", b"hardlink@openssh.com", b"statvfs@openssh.com", b"copy-data",
    b"expand-path@openssh.com", b"home-directory", b"lsetstat@openssh.com", b"fsync@openssh.com",
    b"users-groups-by-id@openssh.com", b"fstatvfs@openssh.com", b"limits@openssh.com",
    b"ranges@asyncssh.com", b"check-file-name", b"",
]  # fmt: skip


def _attributes(rng: random.Random) -> bytes:
    return rng.choice(
        [
            bytes(4),
            struct.pack(">IQ", 1, rng.choice([0, 5, 2**40, 2**63, 2**64 - 1])),
            struct.pack(">II", 4, rng.choice([0, 0o777, 0o7777, 0o107777, 2**32 - 1])),
            struct.pack(">III", 8, rng.choice([0, 1, 2**32 - 1]), 5),
            struct.pack(">I", rng.getrandbits(32)) + rng.randbytes(rng.randrange(40)),
        ]
    )


def _request(rng: random.Random, number: int) -> bytes:
    """One of those that there are, with parts that may be anything."""
    parts: dict[str, Callable[[], bytes]] = {
        "p": lambda: string(rng.choice(PATHS)),
        "h": lambda: string(rng.choice(HANDLES)),
        "a": lambda: _attributes(rng),
        "o": lambda: struct.pack(">Q", rng.choice(OFFSETS)),
        "l": lambda: struct.pack(">I", rng.choice(LENGTHS)),
        "f": lambda: struct.pack(">I", rng.choice(FLAGS)),
        "d": lambda: string(rng.randbytes(rng.choice([0, 1, 1000]))),
        "n": lambda: string(rng.choice(NAMES)),
        "x": lambda: rng.randbytes(rng.randrange(60)),
    }
    kinds = {
        3: "pfa", 4: "h", 5: "hol", 6: "hod", 7: "p", 8: "h", 9: "pa", 10: "ha", 11: "p", 12: "h",
        13: "p", 14: "pa", 15: "p", 16: "p", 17: "p", 18: "pp", 19: "p", 20: "pp", 200: "npp",
        rng.randrange(256): "x",
    }  # fmt: skip
    kind = rng.choice(list(kinds))
    body = b"".join(parts[part]() for part in kinds[kind])
    asked = bytearray(packet(bytes([kind]) + struct.pack(">I", number) + body))
    if rng.random() < 0.2:
        for _ in range(rng.randrange(1, 4)):
            asked[rng.randrange(9, len(asked)) if len(asked) > 9 else 4] = rng.getrandbits(8)
    return bytes(asked)


def _picture(folder: Path) -> list[tuple[str, int, bytes]]:
    return [
        (str(path), path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
        for path in sorted((folder, *folder.rglob("*")))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_may_be_anything(
    tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    for name in ("rw", "ro", "beside"):
        (tmp_path / name / "dir").mkdir(parents=True)
        (tmp_path / name / "file").write_bytes(b"what was there")
    (tmp_path / "secret").write_bytes(b"what nobody may see")
    (tmp_path / "rw" / "out").symlink_to("../secret")
    (tmp_path / "rw" / "shared").hardlink_to(tmp_path / "ro" / "file")
    before = [_picture(tmp_path / name) for name in ("ro", "beside", "secret")]
    answers: list[bytes] = []
    packets = Packets()

    async def main() -> None:
        shares = Shares(
            [Share("rw", tmp_path / "rw"), Share("ro", tmp_path / "ro", read_only=True)]
        )
        files, channel, running = HandleTable(), None, None
        for number in range(REQUESTS):
            if running is None or running.done():
                channel = ServerChannel(
                    shares, files, lambda data: answers.extend(packets.of(data)), lambda: 0, 2**30
                )
                running = asyncio.create_task(channel.run())
                channel.received(INIT)
            assert channel is not None
            expected = len(answers) + 1 + (not number)
            channel.received(_request(rng, number))
            async with asyncio.timeout(10):
                while len(answers) < expected and not running.done():  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0)
        assert running is not None
        assert channel is not None
        channel.ended()
        await running
        shares.close()

    asyncio.run(main())
    assert b"what nobody may see" not in b"".join(answers)
    assert [_picture(tmp_path / name) for name in ("ro", "beside", "secret")] == before
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(answers) > REQUESTS / 2
