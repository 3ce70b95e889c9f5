"""The first mount of a host that is not known yet: what it asks, and how often it logs in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcfs.daemon.questions import Questions
from tests.support.command import Terminal
from tests.support.mounts import Mount, RealHome, Served, served_by_ssh
from tests.support.sshd import ALIAS, SshServer, ssh_server

FIVE = ("a", "b", "c", "d", "e")
TELLS_LOGINS = "LogLevel INFO"


def mount_answering(mount: Mount, *dialogue: tuple[str, str]) -> str:
    """What the terminal showed. `dialogue` are pairs of a question's end and its answer."""
    mount.write_config()
    mount.path.mkdir()
    terminal = Terminal(mount.home, "mount", mount.path)
    for question, answer in dialogue:
        terminal.wait_for(question)
        terminal.write(f"{answer}\n")
    terminal.wait_for("mounted ")
    assert terminal.exit_code() == 0
    return terminal.shown


@pytest.mark.parametrize("transport", ["asyncssh", "openssh"])
def test_a_host_that_five_namespaces_name_asks_once(
    transport: str, real_home: RealHome, tmp_path: Path
) -> None:
    with ssh_server(tmp_path / "s", TELLS_LOGINS) as server:
        server.known_hosts.write_text("")
        served = {name: served_by_ssh(server).but(transport=transport) for name in FIVE}
        mount = Mount(real_home, served)
        shown = mount_answering(mount, ("yes/no", "yes"))
        assert "mounted 5 namespaces" in shown
        assert shown.count("yes/no") == 1
        for name in FIVE:
            assert os.listdir(mount.path / name) == []
            (mount.path / name / "file").write_text(name)
            assert mount.namespace(name).state == "connected"
        mount.umount()
        mount.check_log()
        assert server.log.count("Accepted ") == 1


def test_what_is_decided_holds_for_every_site_that_asks_the_same() -> None:
    """And nothing else that is typed is kept."""
    asked: list[str] = []

    def ask(text: str, echo: bool) -> str | None:
        asked.append(text)
        return "yes"

    questions = Questions(ask)
    host = "The host gate is not known yet.\nTrust this key and connect (yes/no)? "
    other = "The host door is not known yet.\nTrust this key and connect (yes/no)? "
    for text, echo in ((host, True), (host, True), (other, True)):
        assert questions.ask(text, echo) == "yes"
    assert asked == [host, other]
    for text, echo in (("Code: ", True), ("Password (yes/no): ", False)):
        asked.clear()
        for _ in range(2):
            questions.ask(text, echo)
        assert asked == [text, text]


def test_a_jump_host_of_two_sites_asks_once(
    real_home: RealHome, sshd: SshServer, tmp_path: Path
) -> None:
    """Each site is a login of its own; what the user decided about a key holds for all."""
    with ssh_server(tmp_path / "gate", TELLS_LOGINS) as gate:
        gate.known_hosts.write_text("")
        served: dict[str, Served] = {}
        for name in ("one", "two"):
            config = tmp_path / name
            config.write_text(sshd.config_text(ALIAS, "ProxyJump gate") + gate.config_text("gate"))
            served[name] = served_by_ssh(sshd, ssh_config=config)
        mount = Mount(real_home, served)
        shown = mount_answering(mount, ("yes/no", "yes"))
        assert shown.count("yes/no") == 1
        for name in served:
            assert os.listdir(mount.path / name) == []
        mount.umount()
        mount.check_log()
        assert gate.log.count("Accepted ") == 2
