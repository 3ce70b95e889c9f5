"""What of a tunnel needs no login: the configuration, the pauses, what /proc says, the rates."""

from __future__ import annotations

import asyncio
import re
import socket
from pathlib import Path

import asyncssh
import pytest

from hpcfs.config import tunnel as tunnel_config
from hpcfs.config.tunnel import TunnelSettings
from hpcfs.laptop import listening
from hpcfs.laptop.pauses import Pauses
from hpcfs.laptop.rates import Rate
from hpcfs.model.errors import LoginEnded, RemoteError, SetupError, Unreachable
from hpcfs.model.sites import SshSite
from hpcfs.remotes import machine_changes
from hpcfs.tunnel.file import is_valid_name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def load(file: Path, text: str, host: str | None = None, **more: str) -> TunnelSettings:
    file.write_text(text)
    return tunnel_config.load(file, host, **more)  # type: ignore[arg-type]


# --- the configuration ----------------------------------------------------------------------------


def test_the_table_says_all(file: Path) -> None:
    found = load(
        file,
        '[tunnel]\nhost = "me@login3"\nname = "lap"\nshares = ["~/data", "code=~/src:ro"]\n'
        'bind = "login01"\n',
    )
    assert found == TunnelSettings(
        SshSite("login3", user="me"),
        "me@login3",
        "lap",
        ("~/data", "code=~/src:ro"),
        "login01",
        "INFO",
    )


def test_the_command_line_goes_before_the_table(file: Path) -> None:
    text = '[tunnel]\nhost = "login3"\nname = "lap"\nbind = "login01"\nshares = ["~/data"]\n'
    found = load(file, text, "login4", name="other", bind="10.0.0.1")
    assert (found.shown, found.name, found.bind) == ("login4", "other", "10.0.0.1")
    assert found.shares == ("~/data",)


def test_a_namespace_lends_its_settings(file: Path) -> None:
    text = '[namespaces.home]\ntype = "sftp"\nhost = "login3"\nport = 2222\nuser = "me"\n'
    assert load(file, text, "home").site == SshSite("login3", user="me", port=2222)
    assert load(file, text, "login3").site == SshSite("login3")
    bucket = '[namespaces.data]\ntype = "s3"\nbucket = "b"\n'
    with pytest.raises(SetupError, match="without an SSH server"):
        load(file, bucket, "data")


@pytest.mark.parametrize(
    ("host", "site"),
    [
        ("login3", SshSite("login3")),
        ("me@login3", SshSite("login3", user="me")),
        ("login3:", SshSite("login3")),
        ("sftp://me@login3:2222", SshSite("login3", user="me", port=2222)),
    ],
)
def test_a_host_is_named_as_for_a_mount(file: Path, host: str, site: SshSite) -> None:
    assert load(file, "", host).site == site


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("hots = 'x'", "3: [tunnel] unknown key 'hots': did you mean host?"),
        ("share = ['x']", "3: [tunnel] unknown key 'share': did you mean shares?"),
        ("password = 'x'", "password does not belong here"),
        ("shares = '~/data'", "shares must be a list of folders"),
        ("shares = [1]", "shares must be a list of folders"),
        ("name = 'a b'", "name must be at most 64 letters"),
        ("name = '.hidden'", "name must be at most 64 letters"),
        ("bind = '0.0.0.0'", "bind must be the login node's name or address"),
        ("bind = '-x y'", "bind must be the login node's name or address"),
    ],
)
def test_mistakes_name_their_line(file: Path, line: str, said: str) -> None:
    with pytest.raises(SetupError, match=re.escape(said)):
        load(file, f"[tunnel]\nhost = 'login3'\n{line}\n")


def test_nothing_says_where_it_leads(file: Path) -> None:
    with pytest.raises(SetupError, match="say where the tunnel leads"):
        load(file, "")
    with pytest.raises(SetupError, match="must be a table"):
        load(file, "tunnel = 1\n", "login3")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("my-laptop", "my-laptop"),
        ("lap.example.org", "lap"),
        ("Anna's MacBook", "Anna-s-MacBook"),
        ("ö", "laptop"),
        ("x" * 80, "x" * 64),
    ],
)
def test_the_default_name_is_the_host_s(
    monkeypatch: pytest.MonkeyPatch, host: str, name: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    assert tunnel_config.default_name() == name
    assert is_valid_name(name)


# --- pauses ---------------------------------------------------------------------------------------


def unreached() -> RemoteError:
    error = Unreachable("nothing answers")
    error.__cause__ = ConnectionRefusedError()
    return error


def refused() -> RemoteError:
    error = Unreachable("it ended the connection")
    error.__cause__ = asyncssh.ConnectionLost("too many")
    return error


def test_a_host_out_of_reach_is_tried_soon_again() -> None:
    pauses = Pauses()
    assert [pauses.after(unreached()) for _ in range(6)] == [1, 1, 2, 2, 2, 2]


def test_a_host_that_refuses_is_tried_less_and_less_often() -> None:
    pauses = Pauses()
    assert [pauses.after(refused()) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [pauses.after(unreached()), pauses.after(refused())] == [1, 1]
    pauses.reset()
    assert [pauses.after(unreached()), pauses.after(unreached())] == [1, 1]


def test_a_host_that_ends_each_login_is_tried_a_few_times_an_hour() -> None:
    error = LoginEnded("it ended the connection")
    error.__cause__ = ConnectionResetError()
    pauses = Pauses()
    assert [pauses.after(error) for _ in range(4)] == [1, 120, 240, 240]


# --- what the machine says ------------------------------------------------------------------------

TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 0100007F:A411 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   1: 020000C0:A411 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   2: 0100007F:A412 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0
   3: 0100007F:A411 0100007F:E1D2 01 00000000:00000000 00:00000000 00000000     0
"""
TCP6 = """  sl  local_address                         remote_address                        st
   0: 00000000000000000000000001000000:A411 00000000000000000000000000000000:0000 0A
   1: 0000000000000000FFFF00000100007F:A411 00000000000000000000000000000000:0000 0A
   2: 00000000000000000000000000000000:A411 00000000000000000000000000000000:0000 0A
"""


@pytest.mark.parametrize(
    "line",
    [
        "0: 0100007F:XYZ 00000000:0000 0A",
        "0: 0100007F 00000000:0000 0A",
        "0: 01:A411 00000000:0000 0A",
        "0: nonsense:A411 00000000:0000 0A",
        "0: 0100007F0100:A411 00000000:0000 0A",
        "0: :A411 x 0A",
        "0A 0A 0A 0A",
        "\x1b[2J",
    ],
)
def test_what_proc_can_not_say_is_left_out(line: str) -> None:
    """A login node may tell what it likes."""
    assert (
        listening.listeners(f"head\n{line}\n{TCP.splitlines()[1]}", 0xA411)
        == (listening.listeners(TCP, 0xA411)[:1])
    )


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (b"login01\n", "login01"),
        (b"\x1b]0;x\x07", ""),
        (b"a\nb", ""),
        (b"x" * 100_000, ""),
        (b"\xff", ""),
        (b"", ""),
    ],
)
def test_a_login_node_s_name_is_one(
    told: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(*_: object) -> str:
        return told.decode("ascii", "replace")

    monkeypatch.setattr(listening, "_read", read)
    sftp: asyncssh.SFTPClient = object()  # type: ignore[assignment]
    assert asyncio.run(listening.host_name(sftp)) == name


def test_who_listens_is_read_from_proc() -> None:
    assert [str(found) for found in listening.listeners(TCP, 0xA411)] == ["127.0.0.1", "192.0.0.2"]
    found = listening.listeners(TCP6, 0xA411)
    assert [str(address) for address in found] == ["::1", "127.0.0.1", "::"]
    assert [address.is_loopback for address in found] == [True, True, False]
    assert listening.listeners(TCP, 1) == []


def test_waking_up_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_changes, "LOOK_SECONDS", 0.01)
    asleep = iter([100.0, 100.5, 101.0, 160.0])
    seen: list[str] = []

    async def main() -> None:
        woke = asyncio.Event()

        def note(change: machine_changes.MachineChange) -> None:
            if change == "slept":
                seen.append(change)
                woke.set()

        async with machine_changes.watched(note, lambda: next(asleep, 160.0)), asyncio.timeout(10):
            await woke.wait()
            await asyncio.sleep(0.05)

    asyncio.run(main())
    assert seen == ["slept"]


def test_rates_are_of_the_last_seconds() -> None:
    rate = Rate()
    assert rate.now() == 0.0
    for second in range(10):
        rate.note(float(second), 0 if second < 6 else (second - 6) * 300)
    assert rate.now() == 300.0
