"""The protocol between the demo and its child processes.

A child writes one line once it is up (empty, or why it failed), and ends when its stdin ends, so
that a demo that is killed leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from hpcfs.model.errors import SetupError


async def stopped() -> asyncio.StreamReader:
    """Return a reader that reaches end of file when stdin ends or SIGTERM arrives."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    loop.add_signal_handler(signal.SIGTERM, reader.feed_eof)
    return reader


def report(failure: str = "") -> None:
    """Write the line that the parent waits for: empty, or the failure."""
    sys.stdout.write(f"{failure}\n")
    sys.stdout.flush()


def run(serve: Callable[[Path], Awaitable[None]]) -> None:
    """Run `serve` with the demo's directory, which is the first argument, and report its
    SetupError."""

    async def main() -> None:
        await serve(Path(sys.argv[1]))

    try:
        asyncio.run(main())
    except SetupError as error:
        report(str(error))
        sys.exit(1)
