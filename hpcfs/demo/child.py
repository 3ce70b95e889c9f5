"""What the demo's processes have in common: they say one line once they stand (nothing, or why they
do not), and end when their stdin does, so that a demo that is killed leaves nothing behind."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from hpcfs.model.errors import SetupError


async def stopped() -> asyncio.StreamReader:
    """Something to read from that ends with stdin, or SIGTERM."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    loop.add_signal_handler(signal.SIGTERM, reader.feed_eof)
    return reader


def report(failure: str = "") -> None:
    sys.stdout.write(f"{failure}\n")
    sys.stdout.flush()


def run(serve: Callable[[Path], Awaitable[None]]) -> None:
    """`serve` gets the demo's directory, from the command line. Its SetupErrors are reported."""

    async def main() -> None:
        await serve(Path(sys.argv[1]))

    try:
        asyncio.run(main())
    except SetupError as error:
        report(str(error))
        sys.exit(1)
