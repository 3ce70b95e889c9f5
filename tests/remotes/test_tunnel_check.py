"""`hpcfs check --tunnel` finds what would stop a tunnel, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.sshd import ALIAS
from tests.support.tunnels import NAME, LoginNode, login_node, make_laptop, own_address


def check(tmp_path: Path, node: LoginNode, *more: str) -> tuple[int, str]:
    laptop = make_laptop(tmp_path / "laptop", node)
    result = laptop.run("check", "--tunnel", ALIAS, "--name", NAME, *more)
    assert result.stderr == ""
    return result.returncode, result.stdout


def test_all_is_well(tmp_path: Path) -> None:
    with login_node(tmp_path, "GatewayPorts clientspecified") as node:
        code, said = check(tmp_path, node, "--bind", own_address())
        assert code == 0
        assert [line[:4] for line in said.splitlines()] == ["ok  "] * 5
        assert "a Unix socket, which only you can reach" in said
        assert list(node.home.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "more", "code", "said"),
    [
        (["AllowStreamLocalForwarding no"], [], 0, "warn  forward: no Unix socket"),
        (["DisableForwarding yes"], [], 1, "fail  forward: no Unix socket"),
        ([], ["--bind", "ADDRESS"], 0, "warn  compute nodes: compute nodes can't reach"),
    ],
)
def test_what_sshd_refuses(
    tmp_path: Path, options: list[str], more: list[str], code: int, said: str
) -> None:
    with login_node(tmp_path, *options) as node:
        given = [own_address() if word == "ADDRESS" else word for word in more]
        found = check(tmp_path, node, *given)
        assert found[0] == code
        assert said in found[1]
        assert list(node.home.iterdir()) == []


def test_a_directory_that_is_not_private(tmp_path: Path) -> None:
    with login_node(tmp_path) as node:
        node.make_directory(0o777)
        code, said = check(tmp_path, node)
        assert code == 1
        assert "can be changed by other users" in said
        assert node.left() == []


def test_a_tunnel_of_that_name_is_up(tmp_path: Path) -> None:
    with login_node(tmp_path) as node:
        laptop = make_laptop(tmp_path / "laptop", node)
        process = laptop.start_tunnel()
        laptop.wait_until_up()
        before = node.left()
        result = laptop.run("check", "--tunnel", ALIAS, "--name", NAME)
        assert "warn  name: a tunnel named lap is up already" in result.stdout
        assert node.left() == before
        laptop.run("tunnel", "--stop")
        process.communicate(timeout=20)


def test_a_login_that_is_refused(tmp_path: Path) -> None:
    with login_node(tmp_path) as node:
        node.server.authorized_keys.write_text("")
        code, said = check(tmp_path, node)
        assert code == 1
        assert "refused the login" in said
