"""A tunnel from its start to its end, as a user runs it, with a real sshd as the login node."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hpcfs.laptop import tunnel
from hpcfs.model.errors import AccessRefused, Unreachable
from tests.support.command import Terminal
from tests.support.sshd import ALIAS, write_key
from tests.support.tunnels import (
    NAME,
    Laptop,
    LoginNode,
    Running,
    login_node,
    make_laptop,
    running,
)

START = ("tunnel", ALIAS, "--name", NAME)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[LoginNode]:
    with login_node(tmp_path / "node") as found:
        yield found


@pytest.fixture
def laptop(tmp_path: Path, node: LoginNode) -> Iterator[Laptop]:
    found = make_laptop(tmp_path / "laptop", node)
    yield found
    if found.status() is not None:
        found.run("tunnel", "--stop")


def daemon(laptop: Laptop, *more: str) -> None:
    result = laptop.run(*START, "--share", laptop.share, "--daemon", *more)
    assert result.returncode == 0, result.stderr


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_nothing_is_left(
    laptop: Laptop, node: LoginNode, number: signal.Signals
) -> None:
    process = laptop.start_tunnel()
    laptop.wait_until_up()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "is up" in said
    assert "ends" in said
    assert node.left() == []
    assert laptop.status() is None


def test_stop_waits_until_nothing_is_left(laptop: Laptop, node: LoginNode) -> None:
    process = laptop.start_tunnel()
    laptop.wait_until_up()
    stopped = laptop.run("tunnel", "--stop", NAME)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert node.left() == []
    process.communicate(timeout=20)
    assert process.returncode == 0
    again = laptop.run("tunnel", "--stop")
    assert again.returncode == 1
    assert "no tunnel runs here" in again.stderr


def test_ctrl_c_at_a_question_ends_it(laptop: Laptop, node: LoginNode) -> None:
    node.server.known_hosts.write_text("")
    terminal = Terminal(laptop, *START, "--share", laptop.share)
    terminal.wait_for("yes/no")
    terminal.write("\x03")
    assert terminal.exit_code() == 0
    assert not node.tunnels.exists()


# --- status ---------------------------------------------------------------------------------------


def test_status_tells_all(laptop: Laptop, node: LoginNode) -> None:
    daemon(laptop)
    found = laptop.status()
    assert found is not None
    (place,) = node.rendezvous().places
    assert (found.name, found.host, found.state) == (NAME, ALIAS, "up")
    assert found.places == [getattr(place, "path", None)]
    assert found.mounts == []
    text = laptop.run("tunnel", "--status", NAME)
    assert text.returncode == 0
    assert f"{NAME} at {ALIAS}" in text.stdout
    assert "no mount is connected" in text.stdout
    assert laptop.run("tunnel", "--status", "other").returncode == 1


def test_a_tunnel_that_was_killed_is_not_running(laptop: Laptop) -> None:
    process = laptop.start_tunnel()
    laptop.wait_until_up()
    process.kill()
    process.communicate()
    result = laptop.run("tunnel", "--status")
    assert (result.returncode, result.stdout) == (1, "")
    assert "no tunnel runs here" in result.stderr
    daemon(laptop)
    assert laptop.wait_until_up().pid != process.pid


def test_a_second_one_says_who_has_the_name(laptop: Laptop, node: LoginNode) -> None:
    daemon(laptop)
    found = laptop.wait_until_up()
    for more in ((), ("--daemon",)):
        second = laptop.run(*START, "--share", laptop.share, *more)
        assert second.returncode == 1
        assert f"runs here already (pid {found.pid}, to {ALIAS})" in second.stderr
        assert "--name" in second.stderr
    assert node.rendezvous().name == NAME


# --- starts ---------------------------------------------------------------------------------------


def test_the_daemon_asks_before_it_leaves_the_terminal(laptop: Laptop, node: LoginNode) -> None:
    node.server.known_hosts.write_text("")
    terminal = Terminal(laptop, *START, "--share", laptop.share, "--daemon")
    terminal.wait_for("yes/no")
    terminal.write("yes\n")
    terminal.wait_for("is up (log: ")
    assert terminal.exit_code() == 0
    found = laptop.wait_until_up()
    assert os.getsid(found.pid) == found.pid
    assert " is up\n" in Path(found.log_file).read_text()


def test_a_host_key_that_is_accepted_leads_to_one_login(tmp_path: Path) -> None:
    with login_node(tmp_path / "node", "LogLevel INFO") as node:
        laptop = make_laptop(tmp_path / "laptop", node)
        node.server.known_hosts.write_text("")
        terminal = Terminal(laptop, *START, "--share", laptop.share)
        terminal.wait_for("yes/no")
        terminal.write("yes\n")
        terminal.wait_for("no mount is connected; up 0 B/s, down 0 B/s")
        terminal.write("\x03")
        assert terminal.exit_code() == 0
        assert "lost" not in terminal.shown
        assert node.server.log.count("Accepted publickey") == 1
        assert node.left() == []


@pytest.mark.parametrize("more", [(), ("--daemon",)])
def test_a_first_login_that_fails_ends_it(
    laptop: Laptop, node: LoginNode, more: tuple[str, ...]
) -> None:
    node.server.stop()
    result = laptop.run(*START, "--share", laptop.share, *more)
    assert result.returncode == 1
    assert result.stderr.count("connection refused") == (1 if more else 2)  # the log, too
    assert laptop.status() is None


def test_what_makes_no_sense_is_refused(laptop: Laptop) -> None:
    assert "say which folder to share" in laptop.run("tunnel", ALIAS).stderr
    assert "say where the tunnel leads" in laptop.run("tunnel", "--share", "/").stderr
    wrong = laptop.run("tunnel", ALIAS, "--share", "/", "--name", "a/b")
    assert (wrong.returncode, "must be at most 64 letters" in wrong.stderr) == (2, True)
    wrong = laptop.run("tunnel", ALIAS, "--share", "/", "--bind", "0.0.0.0")
    assert (wrong.returncode, "as compute nodes reach it" in wrong.stderr) == (2, True)


def test_the_users_own_ssh_can_not_carry_a_tunnel(laptop: Laptop) -> None:
    laptop.config.parent.mkdir(parents=True)
    laptop.config.write_text(
        f'[namespaces.home]\ntype = "sftp"\nhost = "{ALIAS}"\ntransport = "openssh"\n'
        '[tunnel]\nhost = "home"\nshares = ["~/data"]\n'
    )
    result = laptop.run("tunnel")
    assert result.returncode == 1
    assert "needs forwards, which transport" in result.stderr


def test_the_line_on_a_terminal(laptop: Laptop, node: LoginNode) -> None:
    terminal = Terminal(laptop, *START, "--share", laptop.share)
    terminal.wait_for("no mount is connected; up 0 B/s, down 0 B/s")
    node.server.stop()
    terminal.wait_for(f"reconnecting to {ALIAS}, next try ")
    terminal.wait_for("nothing answers at")
    node.server.start()
    terminal.shown = ""
    terminal.wait_for("no mount is connected")
    terminal.write("\x03")
    assert terminal.exit_code() == 0


# --- losses ---------------------------------------------------------------------------------------


def test_it_comes_back_when_the_login_node_does(laptop: Laptop, node: LoginNode) -> None:
    daemon(laptop)
    before = node.rendezvous()
    node.server.kill()
    lost = laptop.wait_for(lambda found: "refused" in found.reason)
    assert lost.state == "lost"
    assert lost.next_try is None or lost.next_try <= 2.0
    node.server.start()
    back = time.monotonic()
    laptop.wait_until_up()
    assert time.monotonic() - back < 4.0
    after = node.rendezvous()
    assert (after.id, after.host_key, after.client_key) == (
        before.id,
        before.host_key,
        before.client_key,
    )
    assert after.places != before.places
    assert len(node.left()) == 2
    laptop.run("tunnel", "--stop")
    assert node.left() == []


def test_refused_credentials_are_not_tried_again(laptop: Laptop, node: LoginNode) -> None:
    process = laptop.start_tunnel()
    laptop.wait_until_up()
    node.server.authorized_keys.write_text("")
    node.server.kill_sessions()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith("hpcfs: ")
    assert "refused the login" in said
    assert said.count("was lost") == 1


def test_a_changed_host_key_ends_it(node: LoginNode) -> None:
    async def main() -> None:
        async with running(node) as found:
            write_key(node.server.host_key)
            node.server.restart()
            with pytest.raises(Exception, match="host key") as caught:
                await found.task
            assert getattr(caught.value, "lasting", False)

    asyncio.run(main())


def test_a_question_without_anybody_to_ask_ends_it(node: LoginNode) -> None:
    """A daemon's second factor: the key alone is not enough any more."""

    async def main() -> None:
        async with running(node) as found:
            node.server.options = (
                "PasswordAuthentication yes",
                "AuthenticationMethods publickey,password",
            )
            node.server.restart()
            with pytest.raises(AccessRefused, match="no terminal to ask on"):
                await found.task

    asyncio.run(main())


def stop_sessions(node: LoginNode, number: signal.Signals) -> list[int]:
    pids = node.server.sessions()
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return pids


async def dead_link(node: LoginNode, found: Running, limit: float, change: str = "") -> None:
    """The sessions hang, as where packets are lost; a new one works."""
    await asyncio.sleep(0)
    stopped = stop_sessions(node, signal.SIGSTOP)
    assert stopped
    try:
        began = time.monotonic()
        if change:
            found.tunnel._changed(change)  # type: ignore[arg-type]
        await found.until_up(2)
        assert time.monotonic() - began < limit
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("change", ["slept", "network"])
def test_after_a_change_a_dead_connection_is_found_at_once(node: LoginNode, change: str) -> None:
    async def main() -> None:
        async with running(node) as found:
            await dead_link(node, found, tunnel.TEST_SECONDS + 1.0, change)

    asyncio.run(main())


def test_after_a_change_a_connection_that_lives_is_kept(node: LoginNode) -> None:
    async def main() -> None:
        async with running(node) as found:
            found.tunnel._changed("slept")
            await found.until(lambda: found.tunnel._change is None)
            await asyncio.sleep(0.2)
            assert found.states == ["up"]

    asyncio.run(main())


def test_a_dead_connection_is_noticed_within_ten_seconds(node: LoginNode) -> None:
    async def main() -> None:
        async with running(node) as found:
            await dead_link(node, found, 12.5)

    asyncio.run(main())


def test_a_pause_ends_when_the_machine_wakes_up(
    node: LoginNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpcfs.laptop.pauses.SOON_SECONDS", (60.0,))

    async def main() -> None:
        async with running(node) as found:
            node.server.stop()
            await found.until(lambda: "refused" in found.status.reason)
            node.server.start()
            found.tunnel._changed("slept")
            await found.until_up(2)

    asyncio.run(main())


def test_it_can_be_stopped_while_it_is_lost(node: LoginNode) -> None:
    async def main() -> None:
        async with running(node) as found:
            node.server.stop()
            await found.until(lambda: "refused" in found.status.reason)
            await found.stop()
        with pytest.raises(Unreachable):
            async with running(node):
                pass

    asyncio.run(main())
