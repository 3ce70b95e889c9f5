"""`hpcfs login`: logs a namespace in anew, with somebody at a terminal to answer."""

from __future__ import annotations

import trio

from hpcfs.config.config import Settings
from hpcfs.control.control import ControlReply, ControlRequest
from hpcfs.control.server import AskClient
from hpcfs.daemon.assembly import Mount
from hpcfs.daemon.questions import Questions
from hpcfs.model.errors import RemoteError


class Logins:
    """Answers "login". One login at a time: its questions go to one terminal."""

    def __init__(self, settings: Settings, mount: Mount) -> None:
        self._settings = settings
        self._mount = mount
        self._lock = trio.Lock()

    async def answer(self, request: ControlRequest, ask: AskClient) -> ControlReply:
        """Log the namespace in; return why that failed, or an empty answer."""
        chosen = self._settings.namespaces.get(request.name)
        if chosen is None:
            return ControlReply(error=f"this mount has no namespace {request.name}")
        namespace = next(one for one in self._mount.namespaces if one.name == request.name)

        def ask_in_thread(text: str, echo: bool) -> str | None:
            return trio.from_thread.run(ask, text, echo)

        async with self._lock:
            with self._mount.sites[chosen.site].asking(Questions(ask_in_thread).ask):
                try:
                    await namespace.log_in()
                except RemoteError as error:
                    return ControlReply(error=error.message)
        return ControlReply()
