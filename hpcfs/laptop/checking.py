"""`hpcfs check --tunnel`: logs in as a tunnel would, tries everything that it needs, and removes
it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import asyncssh
import uvloop

from hpcfs.config.tunnel import TunnelSettings
from hpcfs.laptop import forwards, listening, publishing
from hpcfs.laptop.acceptor import Acceptor
from hpcfs.laptop.forwards import ForwardEnds
from hpcfs.laptop.identity import TunnelIdentity
from hpcfs.laptop.publishing import TunnelDirectory
from hpcfs.laptop.running import AskUser, ThreadedPrompter
from hpcfs.model.errors import RemoteError
from hpcfs.remotes.sftp.translate import translated
from hpcfs.remotes.ssh.login import SshLogin, log_in
from hpcfs.tunnel.file import DIRECTORY

Level = Literal["ok", "warn", "fail"]
ReportFinding = Callable[[Level, str, str], None]
"""Receives (level, subject, text) of each finding as soon as it is known."""

SECONDS = 30.0


def check(settings: TunnelSettings, ask: AskUser, report: ReportFinding) -> None:
    """Run all checks; `report` gets each finding."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_check(settings, ask, report))


async def _check(settings: TunnelSettings, ask: AskUser, report: ReportFinding) -> None:
    if settings.site.transport != "asyncssh":
        report("fail", settings.shown, 'transport = "openssh" can\'t forward: leave that key out')
        return
    try:
        login = await log_in(settings.site, ThreadedPrompter(ask))
    except RemoteError as error:
        report("fail", settings.shown, error.message)
        return
    report("ok", settings.shown, f"lets {login.user} in")
    try:
        async with asyncio.timeout(SECONDS):
            with translated(b"", login.shown):
                await _look_around(settings, login, report)
    except RemoteError as error:
        report("fail", settings.shown, error.message)
    except TimeoutError:
        report("fail", settings.shown, f"does not answer within {SECONDS:g} s")
    finally:
        await login.close()


async def _look_around(settings: TunnelSettings, login: SshLogin, report: ReportFinding) -> None:
    sftp = await publishing.start_sftp(login)
    missing = await _missing_directories(sftp)
    try:
        directory = await publishing.open_directory(sftp, login.shown)
        await directory.try_file(settings.name)
        report("ok", "rendezvous", f"{directory.path} is yours alone{await _kind(directory)}")
        await _look_for_others(settings, directory, login, report)
        path = directory.new_socket(settings.name)
        handshake = TunnelIdentity().handshake
        acceptor = Acceptor(handshake, lambda stream, _: stream.end("this is a check"))
        try:
            await _try_forwards(settings, ForwardEnds(login, sftp, acceptor), path, report)
        finally:
            await directory.remove_socket(path)
    finally:
        with suppress(asyncssh.Error, OSError):
            for name in missing:
                await sftp.rmdir(name)


async def _missing_directories(sftp: asyncssh.SFTPClient) -> list[str]:
    """Return the directories that a tunnel would have to make, innermost first."""
    found: list[str] = []
    path = (await sftp.realpath(".")).rstrip("/")
    for name in DIRECTORY.split("/"):
        path = f"{path}/{name}"
        if found or not await sftp.lexists(path):
            found.insert(0, path)
    return found


async def _kind(directory: TunnelDirectory) -> str:
    """Return the file system's type in brackets. On a shared file system the socket is visible on
    all login nodes, but works on one."""
    kind = await listening.filesystem(directory.sftp, directory.path)
    return f" ({kind})" if kind else ""


async def _look_for_others(
    settings: TunnelSettings, directory: TunnelDirectory, login: SshLogin, report: ReportFinding
) -> None:
    try:
        await directory.check_free(login.connection, settings.name, "")
    except publishing.NameTaken as error:
        report("warn", "name", error.message)
    else:
        report("ok", "name", f"no other tunnel named {settings.name} is up")


async def _try_forwards(
    settings: TunnelSettings, ends: ForwardEnds, path: str | None, report: ReportFinding
) -> None:
    unix, no_unix = await forwards.try_unix(ends, path)
    tcp, no_tcp = await forwards.try_tcp(ends, forwards.LOOPBACK)
    if unix is not None:
        report("ok", "forward", "a Unix socket, which only you can reach")
    elif tcp is not None:
        report("warn", "forward", f"{no_unix}: a loopback port is used, with a layer of SSH on it")
    else:
        report("fail", "forward", f"{no_unix}; {no_tcp}: {forwards.NO_WAY}")
    if settings.bind is None:
        report("ok", "compute nodes", "not tried: --bind ADDR names the address that they reach")
        return
    bound, obstacle = await forwards.try_bind(ends, settings.bind)
    if bound is None:
        report("warn", "compute nodes", obstacle)
    else:
        report("ok", "compute nodes", f"a port of {ends.login.shown} on {bound.host}")
