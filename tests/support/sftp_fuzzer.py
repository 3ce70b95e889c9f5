"""Drives every operation of the SFTP remote over answers that were changed, and judges how it ends.

The level is that at which packets arrive: remotes/sftp over a channel in memory, in virtual time.
What must hold, whatever a server says:

- a request ends with a result or a RemoteError, by itself where each request is answered, else by
  the deadline of its caller;
- nothing is logged as an error, no task is left behind, and no exception reaches the event loop;
- what a result says is possible (names, sizes, types);
- the next correct answers are as good as ever: requests succeed after one lost connection at most,
  or within RECOVERY_SECONDS where a message was cut off and the server's words made no sense since.
"""

from __future__ import annotations

import asyncio
import logging
import random
import stat
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from asyncssh.logging import SSHLogger, logger as asyncssh_logger

from hpcfs.model.entries import Attributes
from hpcfs.model.errors import RemoteError
from hpcfs.model.sites import SftpRoot, SiteSpec, SshSite
from hpcfs.model.uploads import PIECE_BYTES, UploadRequest
from hpcfs.remotes.base import MAX_FILE_BYTES, is_valid_name, no_report
from hpcfs.remotes.sftp.channels import Channel, of_service, open_channel, open_channels
from hpcfs.remotes.sftp.remote import SftpRemote, SftpSite
from hpcfs.remotes.sftp.session import SftpSession, begin
from hpcfs.remotes.ssh.shared_session import SharedSession
from tests.remotes.contract import MemorySource, get, listed, put, put_ahead
from tests.support.sftp_in_memory import HOME, MemoryServer, Node
from tests.support.sftp_mutations import Mutator
from tests.support.virtual_time import VirtualLoop
from tests.support.wicked import Packets

DEADLINE = 30.0
"""Virtual seconds after which the daemon gives a request up (site/client.py)."""
RECOVERY_SECONDS = 300.0
"""Virtual, too."""
SLOW = 5.0
"""A request that ends by itself has no reason to take longer: no timer of the remote is as long."""
CONTENT = bytes(range(256)) * 300
STEADY = b"what was there before " * 100
KINDS = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK} | {
    stat.S_IFIFO, stat.S_IFSOCK
}  # fmt: skip

Operation = Callable[[SftpRemote], Awaitable[object]]


@dataclass
class Luck:
    """How often an answer is changed, and what was since `begin`."""

    mutator: Mutator
    random: random.Random
    chance: float = 0.0
    changed: int = 0
    ways: Counter[str] = field(default_factory=Counter)
    recent: list[str] = field(default_factory=list)
    lost_framing: bool = False

    def begin(self, chance: float) -> None:
        self.chance, self.recent = chance, self.recent[-12:]

    def sent(self, answer: bytes) -> bytes:
        if self.random.random() >= self.chance:
            return answer
        done = self.mutator.change(answer)
        self.changed += 1
        self.ways[done.how] += 1
        self.recent.append(f"{done.how}: {answer[:60].hex()} -> {done.sent[:60].hex()}")
        self.lost_framing |= not done.is_framed
        return done.sent


class _Wire:
    """One channel to the server: a Carrier."""

    def __init__(self, server: MemoryServer, luck: Luck) -> None:
        self.session: Any
        self._asked = Packets()
        self._server, self._luck = server, luck
        self._closed = False

    @property
    def logger(self) -> SSHLogger:
        return asyncssh_logger

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def write(self, data: bytes) -> None:
        for request in self._asked.of(data):
            asyncio.get_running_loop().call_soon(self._answer, request)

    def _answer(self, request: bytes) -> None:
        if not self._closed:
            self.session.data_received(self._luck.sent(self._server.answer(request)), None)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            asyncio.get_running_loop().call_soon(self.session.connection_lost, None)

    def is_closing(self) -> bool:
        return self._closed


class _Login:
    """An SshLogin as far as SFTP needs one, and its connection."""

    user = "tester"
    shown = "memory"
    connections = 1

    def __init__(self, server: MemoryServer, luck: Luck) -> None:
        self.connection = self
        self.ended = asyncio.Event()
        self._server, self._luck = server, luck
        self._wires: list[_Wire] = []

    async def create_session(self, factory: type[Channel], **options: Any) -> tuple[_Wire, Channel]:
        wire = _Wire(self._server, self._luck)
        self._wires.append(wire)
        wire.session = factory()
        wire.session.connection_made(wire)
        return wire, wire.session

    async def open_shell(self) -> None:
        return None

    def hang_up(self) -> None:
        for wire in self._wires:
            wire.close()
        self.ended.set()

    async def close(self) -> None:
        self.hang_up()


@dataclass
class Finding:
    """One thing that must not be: in which operation, and the changed answers before it."""

    operation: str
    what: str
    recent: list[str]

    def __str__(self) -> str:
        return "\n  ".join([f"{self.operation}: {self.what}", *self.recent[-12:]])


class _Findings(logging.Handler):
    """Collects what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


# --- operations -----------------------------------------------------------------------------------


async def _stat(remote: SftpRemote) -> None:
    entry = await remote.stat(b"file")
    assert stat.S_IFMT(entry.mode) in KINDS, oct(entry.mode)
    assert 0 <= entry.size <= MAX_FILE_BYTES
    assert 0 <= entry.mtime_ns < 2**63


async def _list(remote: SftpRemote) -> None:
    for name, entry in (await listed(remote, b"many")).items():
        assert is_valid_name(name), name
        assert stat.S_IFMT(entry.mode) in KINDS, oct(entry.mode)
        assert 0 <= entry.size <= MAX_FILE_BYTES


async def _fetch(remote: SftpRemote) -> None:
    entry = await remote.stat(b"file")
    length = min(entry.size, 200_000)
    pieces = await remote.fetch(b"file", entry.version, 0, length, 5)
    assert sum(map(len, pieces)) == length
    found = await remote.stat_open(5)
    assert found is None or 0 <= found.size <= MAX_FILE_BYTES
    await remote.release(5)


async def _unsized(remote: SftpRemote) -> None:
    assert len(await remote.read_unsized(b"file", 0, 1000, 0)) <= 1000


async def _read_link(remote: SftpRemote) -> None:
    assert 0 < len(await remote.read_link(b"link")) <= 4095


async def _create(remote: SftpRemote) -> None:
    await remote.create(b"new", 0o600, 9)
    await put(remote, b"new", b"first " * 99, handle=9)
    await remote.remove(b"new")


async def _pieces(remote: SftpRemote) -> None:
    content = _LARGE
    await put_ahead(remote, b"large", content, 0, 11)
    rest = [(PIECE_BYTES, len(content) - PIECE_BYTES)]
    await put(remote, b"large", content, ranges=rest, handle=11)
    await remote.remove(b"large")


async def _append(remote: SftpRemote) -> None:
    size, line = len(CONTENT), b"a line\n"
    request = UploadRequest(
        b"file", size + len(line), size, [(size, len(line))], Attributes(), 0o644, append=True,
        base_version=b"%d:0" % size,
    )  # fmt: skip
    await remote.upload(request, MemorySource(CONTENT + line), no_report)


async def _directories(remote: SftpRemote) -> None:
    await remote.make_directory(b"made", 0o700)
    await remote.rename(b"made", b"moved", replace=False)
    await remote.remove_directory(b"moved")


async def _links(remote: SftpRemote) -> None:
    await remote.make_symlink(b"second", b"file")
    await remote.make_link(b"file", b"hard")
    await remote.remove(b"hard")


_LARGE = b"large" * (PIECE_BYTES // 5 + 1000)

OPERATIONS: dict[str, Operation] = {
    "connect": lambda remote: remote.connect(),
    "stat": _stat,
    "list": _list,
    "fetch": _fetch,
    "read unsized": _unsized,
    "read link": _read_link,
    "create": _create,
    "upload": lambda remote: put(remote, b"new", b"hello" * 1000),
    "overwrite": lambda remote: put(
        remote, b"file", CONTENT, ranges=[(5, 10)], base_size=len(CONTENT), sync=True
    ),
    "replace": lambda remote: put(remote, b"file", CONTENT, replace=True),
    "append": _append,
    "directories": _directories,
    "links": _links,
    "rename": lambda remote: remote.rename(b"link", b"other", replace=True),
    "attributes": lambda remote: remote.set_attributes(
        b"file", Attributes(mode=0o600, mtime_ns=10**18)
    ),
    "owner": lambda remote: remote.set_attributes(b"file", Attributes(uid=7, atime_ns=0)),
    "truncate": lambda remote: remote.truncate(b"file", 3),
    "writable": lambda remote: remote.check_writable(b"file"),
    "usage": lambda remote: remote.disk_usage(),
    "remove": lambda remote: remote.remove(b"file"),
    "remove directory": lambda remote: remote.remove_directory(b"many"),
}
COSTLY: dict[str, Operation] = {"pieces": _pieces}
"""Megabytes each: now and then."""


# --- the story ------------------------------------------------------------------------------------


class Fuzzer:
    """One remote, and the server that it meets. To be used on a VirtualLoop."""

    def __init__(self, seed: int) -> None:
        self.server = MemoryServer()
        luck = random.Random(seed)
        self.luck = Luck(Mutator(luck), luck)
        self.findings: list[Finding] = []
        self._logins: list[_Login] = []
        self.outcomes: Counter[str] = Counter()
        spec = SiteSpec(SshSite("memory"), {"ns": SftpRoot("folder")}, "/nowhere", 1000, 1000)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self._loop = loop
        self.site = SftpSite(spec, SharedSession(lambda: self._open(spec), loop.time))
        self.remote = self.site.remote("ns")

    async def _open(self, spec: SiteSpec) -> SftpSession:
        login: Any = _Login(self.server, self.luck)
        self._logins = [login]
        self.luck.lost_framing = False
        session = await begin(login, spec, of_service(open_channels(login), login))
        session.open_channel = lambda: open_channel(login)
        return session

    async def run(self, answers: int) -> None:
        """Go on until so many answers were changed, or something was found."""
        complaints = _Findings()
        logging.getLogger().addHandler(complaints)
        try:
            self.furnish()
            while self.luck.changed < answers and not self.findings:
                chance = self.luck.random.choice((0.05, 0.3, 0.6, 1.0))
                self.luck.begin(chance)
                for name in self._chosen():
                    await self._meet(name, {**OPERATIONS, **COSTLY}[name])
                self._look(complaints)
                self.luck.begin(0.0)
                await self._works()
                self._look(complaints)
        finally:
            logging.getLogger().removeHandler(complaints)
            await self.site.close()

    def _chosen(self) -> list[str]:
        costly = list(COSTLY) if self.luck.random.random() < 0.002 else []
        return (
            self.luck.random.choices(list(OPERATIONS), k=self.luck.random.randrange(1, 12)) + costly
        )

    def furnish(self) -> None:
        """Put everything there as it was."""
        top = HOME + b"/folder"
        self.server.nodes = {
            path: node for path, node in self.server.nodes.items() if not path.startswith(top)
        }
        for path in (top, top + b"/many"):
            self.server.nodes[path] = Node(stat.S_IFDIR | 0o755)
        for number in range(120):
            self.server.put(top + b"/many/name%d" % number, b"")
        self.server.put(top + b"/file", CONTENT)
        self.server.put(top + b"/steady", STEADY)
        self.server.nodes[top + b"/link"] = Node(stat.S_IFLNK | 0o777, bytearray(b"file"))

    async def _meet(self, name: str, operation: Operation) -> None:
        began = self._loop.time()
        outcome = await self._outcome(operation)
        took = self._loop.time() - began
        self.outcomes[outcome] += 1
        if outcome.startswith("!"):
            self._found(name, outcome)
        if took > SLOW and not self.luck.lost_framing:
            self._found(name, f"took {took:.0f} s, {outcome}, though all was answered")

    async def _outcome(self, operation: Operation) -> str:
        self.site.try_now()
        task = asyncio.ensure_future(operation(self.remote))
        if not (await asyncio.wait([task], timeout=DEADLINE))[0]:
            task.cancel()
            await asyncio.wait([task], timeout=DEADLINE)  # it may wait for the end of what it sent
            return "no answer"
        try:
            task.result()
        except RemoteError as error:
            return type(error).__name__
        except Exception as error:
            return f"! {type(error).__name__}: {error}"
        return "done"

    async def _works(self) -> None:
        """All is well again, now that the server is."""
        self.furnish()
        lost_framing = self.luck.lost_framing
        began = self._loop.time()
        attempts = 0
        while outcome := await self._problem():
            attempts += 1
            took = self._loop.time() - began
            if outcome == "NotFound" and attempts == 1:
                self._believed_a_lie()
                continue
            if took > RECOVERY_SECONDS or (attempts > 1 and not lost_framing):
                self._found("afterwards", f"{outcome} after {attempts} attempts and {took:.0f} s")
                return

    def _believed_a_lie(self) -> None:
        """Another home directory, and a folder there: two answers in good form, which agree and are
        wrong, are believed until the connection ends."""
        self.outcomes["a lie believed"] += 1
        for login in self._logins:
            login.hang_up()

    async def _problem(self) -> str:
        async def all_that_matters(remote: SftpRemote) -> None:
            assert await get(remote, b"steady") == STEADY
            names = await listed(remote, b"")
            assert {b"steady", b"file", b"many", b"link"} <= names.keys(), sorted(names)
            await put(remote, b"fresh", b"fresh", replace=True)
            assert await get(remote, b"fresh") == b"fresh"
            await remote.make_symlink(b"to steady", b"steady")
            assert await remote.read_link(b"to steady") == b"steady"
            await remote.remove(b"to steady")
            await remote.set_attributes(b"fresh", Attributes(mode=0o640))
            await remote.rename(b"fresh", b"older", replace=True)
            await remote.remove(b"older")

        outcome = await self._outcome(all_that_matters)
        return "" if outcome == "done" else outcome

    def _look(self, complaints: _Findings) -> None:
        for line in complaints.lines:
            self._found("the log", line)
        complaints.lines.clear()
        for context in self._loop.complaints:
            self._found("the event loop", f"{context.get('message')}: {context.get('exception')!r}")
        self._loop.complaints.clear()
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if len(left) > 20:
            self._found("afterwards", f"{len(left)} tasks are left, as {left[0]}")

    def _found(self, operation: str, what: str) -> None:
        self.findings.append(Finding(operation, what, list(self.luck.recent)))


def complain(findings: list[Finding]) -> str:
    return "\n".join(map(str, findings[:5]))
