"""The daemon before its mount exists: the control socket is there already."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from hpcfs.config import config
from hpcfs.control import control
from hpcfs.daemon import main
from hpcfs.daemon.main import MountFailed


def test_letting_go_is_answered_before_the_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an earlier mount left may take long to resume."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    settings = config.settings(
        config.load(None, [("ns", "nobody.invalid:")]), tmp_path / "mount", tmp_path / "cache"
    )
    answers: list[control.Outcome] = []

    async def resume(self: object) -> None:
        request = control.ControlRequest("let_go")
        answers.append(
            await trio.to_thread.run_sync(control.work, settings.socket, request, lambda step: None)
        )
        raise MountFailed("that is enough")

    monkeypatch.setattr(main._Daemon, "_resume", resume)
    daemon = main._Daemon(settings, lambda *_: None, lambda status: None, None)
    with pytest.RaisesGroup(MountFailed, flatten_subgroups=True):
        trio.run(daemon.run)
    assert answers == [control.Outcome(0)]
