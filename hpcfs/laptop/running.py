"""Builds a tunnel and runs it until a signal or `hpcfs tunnel --stop` ends it."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvloop

from hpcfs.config.tunnel import TunnelSettings
from hpcfs.laptop import control
from hpcfs.laptop.shares import Share
from hpcfs.laptop.status import TunnelStatus
from hpcfs.laptop.tunnel import Tunnel, TunnelPlan
from hpcfs.model.errors import RemoteError, SetupError
from hpcfs.system import dumps, logs, paths

log = logging.getLogger(__name__)

SHOW_SECONDS = 1.0

AskUser = Callable[[str, bool], str | None]
"""Returns the text that the user typed, echoed or not; None where nobody can be asked. Blocks."""
Show = Callable[[TunnelStatus], None]


def log_file(name: str) -> Path:
    """Return the path of the tunnel's log."""
    return paths.state_dir() / f"tunnel-{name}.log"


def run(
    settings: TunnelSettings,
    shares: tuple[Share, ...],
    ask: AskUser,
    show: Show,
    *,
    to_stderr: bool,
) -> None:
    """Run a tunnel until it is stopped.

    `show` gets the status when it changes, and once a second. Raises SetupError when the tunnel
    ended by itself.
    """
    plan = TunnelPlan(
        name=settings.name,
        site=settings.site,
        shown=settings.shown,
        shares=shares,
        bind=settings.bind,
        log_file=str(log_file(settings.name)),
    )
    dumps.forbid()
    paths.make_private(paths.state_dir())
    logs.set_up(log_file(plan.name), settings.log_level, "tunnel", to_stderr=to_stderr)
    logging.getLogger("asyncssh").setLevel(logging.WARNING)
    try:
        with (
            control.only_one(plan.name),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(_run(plan, ask, show))
    except RemoteError as error:
        log.error("the tunnel ends: %s", error.message)  # noqa: TRY400 - it is a sentence
        raise SetupError(error.message) from error
    finally:
        log.info("the tunnel %s ends", plan.name)


async def _run(plan: TunnelPlan, ask: AskUser, show: Show) -> None:
    tunnel = Tunnel(plan, ThreadedPrompter(ask), lambda: show(tunnel.status()))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, tunnel.stop)
    async with control.answering(plan.name, tunnel.status, tunnel.stop):
        showing = asyncio.create_task(_show_forever(tunnel, show))
        try:
            await tunnel.run()
        finally:
            showing.cancel()
            await asyncio.wait([showing])


async def _show_forever(tunnel: Tunnel, show: Show) -> None:
    while True:
        await asyncio.sleep(SHOW_SECONDS)
        show(tunnel.status())


class ThreadedPrompter:
    """Implements Prompter (remotes/base.py). Each question has a thread of its own, which nobody
    waits for when the tunnel ends: it may hang on the terminal."""

    def __init__(self, ask: AskUser) -> None:
        self._ask = ask

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        """Ask the user; None where nobody can be asked."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[str | None] = loop.create_future()

        def deliver(typed: str | None) -> None:
            if not answer.done():
                answer.set_result(typed)

        def wait_for_answer() -> None:
            typed = self._ask(text, echo)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(deliver, typed)

        threading.Thread(target=wait_for_answer, daemon=True).start()
        return await answer
