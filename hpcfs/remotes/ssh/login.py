"""Makes an SSH connection: jump hosts, host keys, keys, passphrases, passwords and second factors.

Owns the conversation with the user during a login. Nothing typed is stored or logged. Each
question is asked a bounded number of times within one connection, as ssh does, and never again by
itself: what comes out is a connection or an error (`ssh_errors.login_error`).

The clock of `connect_timeout` stands still while the user is typing. A login that somebody takes
part in may take longer, as there may be something to confirm on a phone (login_clock.py).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import asyncssh
from asyncssh.public_key import KeyPairListArg

from hpcfs.model.errors import LoginNeeded, NotConnected, RemoteError, Unreachable, WrongSettings
from hpcfs.model.sites import SshSite
from hpcfs.remotes.base import Prompter
from hpcfs.remotes.ssh.hostkeys import Judgement
from hpcfs.remotes.ssh.liveness import Liveness
from hpcfs.remotes.ssh.login_clock import LoginClock, said_by
from hpcfs.remotes.ssh.offer import LoginOffer, with_halves
from hpcfs.remotes.ssh.proxy import Proxy
from hpcfs.remotes.ssh.reach import AddressInfo, Destination, NoneAnswers, address_of, reach
from hpcfs.remotes.ssh.settings import CHANNEL_WINDOW_BYTES, Hop, jump_site, read_hop
from hpcfs.remotes.ssh.shell import ChannelShell, Shell
from hpcfs.remotes.ssh.translate import LoginProgress, login_error

log = logging.getLogger(__name__)

MAX_JUMPS = 8
CLOSE_SECONDS = 5.0
MOST_SAID = 100
_SAID = "hpcfs_said"
_PROXY = "hpcfs_proxy"


@dataclass(frozen=True)
class SshLogin:
    """A connection and the jump hosts' connections that carry it, nearest first. `ended` is set
    when the connection has ended, for any reason."""

    connection: asyncssh.SSHClientConnection
    jumps: tuple[asyncssh.SSHClientConnection, ...]
    user: str
    shown: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    attended: bool = False
    """Whether the user typed something, which the next login would ask for again."""
    liveness: Liveness | None = None

    @property
    def connections(self) -> int:
        """How many connections there are, those to jump hosts included."""
        return 1 + len(self.jumps)

    @property
    def said(self) -> Sequence[str]:
        """Return what the server told for debugging: OpenSSH's gives its reason for refusing a
        forward nowhere else."""
        return cast(Sequence[str], self.connection.get_extra_info(_SAID, []))

    async def open_shell(self) -> Shell:
        """Start a shell in a channel of its own. Raises asyncssh's errors and OSError."""
        return await ChannelShell.start(self.connection)

    async def check(self, *, doubted: bool = False) -> None:
        """Ask for a sign of life now, and end the connection where none comes soon; one that was
        `attended` only if it is `doubted`."""
        if self.liveness is not None:
            await self.liveness.check(doubted=doubted)

    async def close(self) -> None:
        """Close the connection, then those that carry it."""
        if self.liveness is not None:
            self.liveness.end()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await _end([self.connection, *reversed(self.jumps)])
        except TimeoutError:
            log.warning("the connection to %s does not end; it is left alone", self.shown)


async def _end(connections: Sequence[asyncssh.SSHClientConnection]) -> None:
    """And the ProxyCommands under them."""
    for connection in connections:
        connection.abort()
    for connection in connections:
        await connection.wait_closed()
        if (proxy := connection.get_extra_info(_PROXY)) is not None:
            await proxy.close()


async def log_in(
    site: SshSite,
    prompter: Prompter,
    reach_seconds: float | None = None,
    offer: LoginOffer | None = None,
) -> SshLogin:
    """Connect to the site.

    An address of the first host must take the TCP connection within `reach_seconds`, where that is
    given. `offer` remembers what was offered.

    Raises AccessRefused, HostKeyRefused, WrongSettings or Unreachable: NotConnected where nobody
    was logged in anywhere.
    """
    offer = offer or LoginOffer(site)
    offer.begin()
    attempt = _Attempt(prompter, reach_seconds, offer)
    try:
        target = await attempt.read(site)
        await attempt.connect_jumps(target, site)
        connection, ended = await attempt.connect(target, site)
    except NotConnected as error:
        await _end(attempt.jumps[::-1])
        raise (Unreachable(error.message) if attempt.jumps else error) from error
    except BaseException:
        await _end(attempt.jumps[::-1])
        raise
    jumps, attended = tuple(attempt.jumps), attempt.attended
    liveness = Liveness([*jumps, connection], attended=attended)
    return SshLogin(connection, jumps, target.user, target.shown, ended, attended, liveness)


@dataclass
class _Attempt:
    """One login. `jumps` fills as it goes, so that the caller can close them whatever happens. One
    that is lost takes the connections through it down, which is noticed there."""

    prompter: Prompter
    reach_seconds: float | None
    offer: LoginOffer
    jumps: list[asyncssh.SSHClientConnection] = field(default_factory=list)
    attended: bool = False

    async def read(self, site: SshSite, *, is_behind: bool = False) -> Hop:
        hop = await read_hop(site, is_behind=is_behind)
        files = [half for path in hop.identities.sources for half in with_halves(path)]
        await self.offer.note([*files, *hop.host_keys.rules.files], hop.identities.agent)
        return hop

    async def connect(
        self, hop: Hop, site: SshSite
    ) -> tuple[asyncssh.SSHClientConnection, asyncio.Event]:
        login = _HopLogin(hop, site, self.prompter, self.reach_seconds)
        try:
            return await login.connect(self.jumps[-1] if self.jumps else None)
        finally:
            self.attended = self.attended or login.attended

    async def connect_jumps(self, target: Hop, site: SshSite, depth: int = 0) -> None:
        """The first host of a ProxyJump is reached as its own configuration says, by jumps or
        not."""
        depth += len(target.jumps)
        if depth > MAX_JUMPS:
            raise WrongSettings(
                f"ProxyJump of {site.host} has more than {MAX_JUMPS} hosts or a loop"
            )
        for number, jump in enumerate(target.jumps):
            hop_site = jump_site(jump, site)
            hop = await self.read(hop_site, is_behind=number > 0)
            if number == 0:
                await self.connect_jumps(hop, hop_site, depth)
            connection, _ = await self.connect(hop, hop_site)
            self.jumps.append(connection)


class _Nobody:
    """Answers no question: for BatchMode."""

    async def ask(self, text: str, *, echo: bool = False) -> str | None:
        return None


class _HopLogin:
    """One login at one host. Where its host key is asked about there are two connections: a login
    is only made over the second, to the same address."""

    def __init__(
        self, hop: Hop, site: SshSite, prompter: Prompter, reach_seconds: float | None
    ) -> None:
        self._hop = hop
        self._prompter = prompter if hop.asks else _Nobody()
        self._seconds = site.connect_timeout
        self._reach_seconds = reach_seconds or site.connect_timeout
        self._clock = LoginClock(site.connect_timeout, self._prompter)
        self._address: AddressInfo | None = None

    @property
    def attended(self) -> bool:
        """Whether the user typed something."""
        return self._clock.was_answered

    async def connect(
        self, tunnel: asyncssh.SSHClientConnection | None
    ) -> tuple[asyncssh.SSHClientConnection, asyncio.Event]:
        """The connection, and what is set when it has ended."""
        while True:
            client = _LoginClient(self._hop, self._clock)
            try:
                if tunnel is not None:
                    connection = await self._log_in(client, tunnel=_Tunnel(tunnel))
                elif self._hop.proxy_command is not None:
                    connection = await self._through_proxy(client)
                else:
                    connection = await self._log_in(client, sock=await self._reach())
            except asyncssh.HostKeyNotVerifiable as error:
                if client.judgement is None:
                    raise login_error(error, self._hop) from error
                await self._hop.host_keys.decide(client.judgement, self._prompter)
            else:
                return connection, client.ended

    async def _log_in(self, client: _LoginClient, **way: Any) -> asyncssh.SSHClientConnection:
        """Log in. Raises RemoteErrors, and HostKeyNotVerifiable."""
        hop = self._hop
        try:
            async with self._clock.running(), hop.identities.options() as keys:
                options = way | hop.options | keys
                return await asyncssh.connect(
                    hop.host, hop.port, client_factory=lambda: client, **options
                )
        except asyncssh.HostKeyNotVerifiable:
            raise
        except TimeoutError:
            raise self._not_in_time(client) from None
        except (asyncssh.Error, OSError, ValueError) as error:
            raise login_error(error, hop, self._progress(client)) from error

    def _not_in_time(self, client: _LoginClient) -> RemoteError:
        """Who takes part in a login is not troubled again by itself: several times a minute, a
        phone that asks to confirm it would have the account locked."""
        hop = self._hop
        if client.authenticating and self._clock.was_answered:
            return LoginNeeded(
                f"{hop.user}@{hop.host} port {hop.port} did not let us in within "
                f"{self._clock.seconds:g} s: run 'hpcfs login', and confirm it on your phone if it "
                "asks you to"
            )
        error = self._no_answer(self._seconds)
        return Unreachable(error.message) if client.authenticating else error

    def _progress(self, client: _LoginClient) -> LoginProgress:
        return LoginProgress(
            connected=client.connected,
            greeted=client.greeted,
            authenticating=client.authenticating,
            nobody_to_ask=client.nobody_to_ask,
            answered=self._clock.was_answered,
            banner=client.banner,
        )

    async def _through_proxy(self, client: _LoginClient) -> asyncssh.SSHClientConnection:
        """The ProxyCommand ends with the connection."""
        try:
            async with asyncio.timeout(self._seconds):
                proxy = await Proxy.open(self._hop)
        except TimeoutError:
            raise Unreachable(self._no_answer(self._seconds).message) from None
        client.proxy = proxy
        try:
            return await self._log_in(client, sock=proxy.socket)
        except Unreachable as error:
            words = await proxy.last_words()
            if not words:
                raise
            raise Unreachable(f"{error.message} (its ProxyCommand says: {words})") from error
        except BaseException:
            await proxy.close()
            raise

    async def _reach(self) -> socket.socket:
        """Return a socket at an address that answers."""
        hop, seconds = self._hop, self._reach_seconds
        try:
            host = Destination(hop.host, hop.port, hop.family, hop.bind_address)
            sock = await reach(host, seconds, self._address)
        except TimeoutError:
            raise self._no_answer(seconds) from None
        except NoneAnswers as error:
            raise NotConnected(
                f"no address of {hop.shown} port {hop.port} answers: {error}"
            ) from None
        except (OSError, ValueError) as error:
            raise login_error(error, hop) from error
        self._address = address_of(sock)
        return sock

    def _no_answer(self, seconds: float) -> NotConnected:
        where = f"{self._hop.shown} port {self._hop.port}"
        return NotConnected(f"{where} did not answer within {seconds:g} s")


class _Tunnel:
    """A jump host's connection, of which asyncssh asks for one channel to the next host. By default
    that would carry 2 MiB per round trip."""

    def __init__(self, connection: asyncssh.SSHClientConnection):
        self._connection = connection
        self.logger = connection.logger

    async def create_connection(self, *where: Any) -> Any:
        return await self._connection.create_connection(*where, window=CHANNEL_WINDOW_BYTES)


class _LoginClient(asyncssh.SSHClient):
    """asyncssh's callbacks during one connection attempt."""

    def __init__(self, hop: Hop, clock: LoginClock):
        self._hop = hop
        self._clock = clock
        self.ended = asyncio.Event()
        self.proxy: Proxy | None = None
        self._key_files = list(hop.identities.key_files)
        self._passwords_left = self._dialogues_left = hop.prompts
        self._said: deque[str] = deque(maxlen=MOST_SAID)
        self.judgement: Judgement | None = None
        self.nobody_to_ask = False
        self.connected = False
        self._connection: asyncssh.SSHClientConnection | None = None
        self.authenticating = False
        self.banner = ""

    def connection_made(self, conn: asyncssh.SSHClientConnection) -> None:
        self.connected = True
        self._connection = conn
        conn.set_extra_info(**{_SAID: self._said, _PROXY: self.proxy})

    @property
    def greeted(self) -> bool:
        """Whether the server said anything: its version, or first why it takes nobody now."""
        connection: Any = self._connection
        if connection is None:
            return False
        has_words = getattr(connection, "_banner_lines", 0) > 0
        return has_words or bool(connection.get_extra_info("server_version"))

    def debug_msg_received(self, msg: str, lang: str, always_display: bool) -> None:
        self._said.append(msg)

    def begin_auth(self, username: str) -> None:
        self.authenticating = True

    def connection_lost(self, exc: Exception | None) -> None:
        log.debug("connection to %s ended: %s", self._hop.shown, exc)
        self.ended.set()
        if self.proxy is not None:
            self.proxy.end()

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        """Called for each plain key; where the user decides, once this attempt is over."""
        self.judgement = self._hop.host_keys.judge(key, addr)
        if self.judgement.kind == "unproved":  # who is in the middle gets no password
            self._passwords_left = self._dialogues_left = 0
        return self.judgement.is_trusted

    def auth_banner_received(self, msg: str, lang: str) -> None:
        self.banner = msg
        log.debug("%s says: %s", self._hop.shown, msg)

    async def public_key_auth_requested(self) -> KeyPairListArg | None:
        """Called when agent and plain keys were refused: now the ones that need a passphrase."""
        while self._key_files:
            path = self._key_files.pop(0)
            if _is_encrypted(path):
                key = await self._unlock(path)
                if key is not None:
                    return _with_certificate(key, path)
        return None

    async def _unlock(self, path: Path) -> asyncssh.SSHKey | None:
        for _ in range(self._hop.prompts):
            passphrase = await self._ask(f"Passphrase for the key {path}: ")
            if not passphrase:
                return None
            try:
                return await asyncio.to_thread(asyncssh.read_private_key, path, passphrase)
            except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as error:
                log.warning("the key %s was not unlocked: %s", path, error)
        return None

    async def password_auth_requested(self) -> str | None:
        if self._passwords_left == 0:
            return None
        self._passwords_left -= 1
        password = await self._ask(f"Password for {self._hop.user}@{self._hop.host}: ")
        if password is not None:
            self._clock.expect_person()
        return password

    def kbdint_auth_requested(self) -> str | None:
        if self._dialogues_left == 0 or self.nobody_to_ask:
            return None
        self._dialogues_left -= 1
        self._clock.expect_person()
        return ""

    async def kbdint_challenge_received(
        self, name: str, instructions: str, lang: str, prompts: Sequence[tuple[str, bool]]
    ) -> list[str] | None:
        heading = "".join(f"{text.strip()}\n" for text in (name, instructions) if text.strip())
        responses = []
        for text, echo in prompts:
            said = said_by(f"{self._hop.user}@{self._hop.host}", heading + text)
            answer = await self._ask(said, echo)
            if answer is None:
                return None
            responses.append(answer)
            heading = ""
        return responses

    async def _ask(self, text: str, echo: bool = False) -> str | None:
        answer = None if self.nobody_to_ask else await self._clock.ask(text, echo=echo)
        self.nobody_to_ask = answer is None
        return answer


def _is_encrypted(path: Path) -> bool:
    try:
        asyncssh.read_private_key(path)
    except asyncssh.KeyImportError as error:
        return str(error).startswith("Passphrase")
    except OSError as error:
        log.warning("%s can't be read: %s", path, error)
    return False


def _with_certificate(key: asyncssh.SSHKey, path: Path) -> KeyPairListArg:
    certificate = path.with_name(f"{path.name}-cert.pub")
    return [(key, str(certificate))] if certificate.is_file() else [key]
