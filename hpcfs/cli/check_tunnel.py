"""`hpcfs check --tunnel`: checks what a tunnel needs, from the laptop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hpcfs.cli import terminal
from hpcfs.cli.findings import Finding, Level
from hpcfs.config import tunnel as tunnel_config


def check(
    config_file: Path | None,
    host: str,
    name: str | None,
    bind: str | None,
    show: Callable[[Finding], str],
) -> int:
    """Run the checks, and return the exit code. Raises SetupError for invalid settings."""
    from hpcfs.laptop import checking  # imports asyncssh

    settings = tunnel_config.load(config_file, host, name, (), bind)
    levels: list[str] = []

    def report(level: Level, subject: str, text: str) -> None:
        levels.append(show(Finding(level, subject, text)))

    with terminal.restored():
        checking.check(settings, terminal.ask, report)
    return 1 if "fail" in levels else 0
