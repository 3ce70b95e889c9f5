"""The command line: its arguments, its manners and its speed; starting up is in tests/mount."""

from __future__ import annotations

import getpass
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest

from hpcfs.cli import arguments, check_s3, check_ssh, output
from hpcfs.cli.arguments import Arguments
from hpcfs.config import config
from hpcfs.model.sites import S3Root, S3Site, Secret, SshSite
from hpcfs.system.text import printable
from tests.support import s3
from tests.support.command import Home, Terminal, make_home

ANSWER_SECONDS = 0.4
HEAVY = {"trio", "pyfuse3", "asyncssh", "rich", "aiobotocore", "botocore", "asyncio", "uvloop"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path.resolve())


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], Arguments(None, [])),
        (["~/mnt"], Arguments("~/mnt", [])),
        (["login3:data", "mnt"], Arguments("mnt", [(None, "login3:data")])),
        (["mnt", "login3:data"], Arguments("mnt", [(None, "login3:data")])),
        (["sftp://h/x=y"], Arguments(None, [(None, "sftp://h/x=y")])),
        (["h:x=y", "m"], Arguments("m", [(None, "h:x=y")])),
        (
            ["a=s3://b?region=eu", "/m", "b=me@h:x=y"],
            Arguments("/m", [("a", "s3://b?region=eu"), ("b", "me@h:x=y")]),
        ),
        (["./h:x"], Arguments("./h:x", [])),
        (["/x/a=b"], Arguments("/x/a=b", [])),
        (["a=b"], Arguments(None, [("a", "b")])),
    ],
)
def test_arguments_come_in_any_order(given: list[str], expected: Arguments) -> None:
    assert arguments.recognise(given) == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a", "b"], "one mount point, not 2"),
        (["a:", "b:"], "needs a name"),
        (["a=a:", "b:"], "needs a name"),
        (["a/b=h:x"], "can't name a remote"),
        (["..=h:x"], "can't name a remote"),
        (["=h:x"], "can't name a remote"),
    ],
)
def test_arguments_that_make_no_sense(given: list[str], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        arguments.recognise(given)


def test_a_directory_with_an_equals_sign_is_a_mount_point(home: Home) -> None:
    (home.path / "a=b").mkdir()
    assert arguments.recognise([f"{home.path}/a=b"]).mountpoint == f"{home.path}/a=b"


# --- manners ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_names_all_commands(home: Home) -> None:
    result = home.run("--help")
    assert result.returncode == 0
    writes = ("sync", "retry", "recover", "discard")
    for name in ("mount", "umount", "status", *writes, "cache", "check", "tunnel", "init", "demo"):
        assert f"\n  {name} " in result.stdout
    for name in ("mount", "umount", "unmount", "status", *writes, "cache", "check", "init"):
        assert "Usage: hpcfs" in home.run(name, "--help").stdout
    assert home.run("--version").stdout.startswith("hpcfs ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ["nonsense"],
        ["mount", "--nonsense"],
        ["mount", "a", "b"],
        ["mount", "--cache-size", "lots", "h:", "mnt"],
        ["mount", "--cache-size", "1 MiB", "h:", "mnt"],
        ["mount", "--write", "bakc", "h:", "mnt"],
        ["mount", "--symlinks", "no", "h:", "mnt"],
        ["umount"],
        ["umount", "--timeout", "-1", "mnt"],
        ["umount", "--timeout", "soon", "mnt"],
        ["discard"],
        ["recover", "mnt"],
        ["cache", "nonsense"],
        ["cache", "warm"],
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_sentence(home: Home, given: list[str]) -> None:
    result = home.run(*given)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hpcfs: ")
    assert "Try 'hpcfs" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["mount"], "hpcfs init"),
        (["mount", "login3:"], "say where to mount"),
        (["mount", "--config", "no.toml", "mnt"], "no configuration file"),
        (["mount", "login3:", "absent"], "mkdir -p"),
        (["mount", "sftp://me:hunter2@h/", "mnt"], "password or a key"),
        (["mount", "--cache-dir", "mnt/cache", "login3:", "mnt"], "can't be inside"),
        (["umount", "mnt"], "nothing is mounted"),
        (["status", "mnt"], "no hpcfs mount at"),
        (["sync", "mnt/a"], "is in no mount"),
        (["retry", "mnt/a"], "is in no mount"),
        (["discard", "mnt/a", "--yes"], "is in no mount"),
        (["recover", "mnt/a", "--to", "out"], "is in no mount"),
        (["cache", "clear", "mnt"], "is in no mount"),
        (["cache", "warm", "mnt/a"], "is in no mount"),
    ],
)
def test_a_failure_is_exit_code_1_and_one_sentence(home: Home, given: list[str], said: str) -> None:
    result = home.run(*given)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("hpcfs: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr


@pytest.mark.slow
def test_a_configuration_mistake_names_its_line(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text('mountpoint = "/m"\n[namespaces.x]\ntype = "sfpt"\n')
    result = home.run("mount")
    assert result.returncode == 1
    assert f"{home.config}:3: [namespaces.x] type must be" in result.stderr


@pytest.mark.slow
def test_scripts_get_a_list_even_of_nothing(home: Home) -> None:
    result = home.run("status", "--json", "mnt")
    assert (result.returncode, result.stdout, result.stderr) == (1, "[]\n", "")


@pytest.mark.slow
def test_a_reader_that_stops_reading_sees_no_traceback(home: Home) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        home.command("status", "--json"),
        env=home.environment(),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_what_a_remote_says_cannot_control_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\n\udcff") == "a�[2Jb���"
    assert printable("größe 日本") == "größe 日本"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 * 1024**2, "1.5 GiB"),
        (2**63, "8192.0 PiB"),
    ],
)
def test_sizes_are_shown_in_the_unit_that_fits(count: int, shown: str) -> None:
    assert output.size(count) == shown


# --- speed --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("given", [["--help"], ["status"], ["--version"]])
def test_small_commands_answer_at_once(home: Home, given: list[str]) -> None:
    """The best of several: other programs on this machine must not decide it."""
    command = [sys.executable, "-c", "from hpcfs.cli.main import main; main()", *given]
    best = min(_seconds(command, home) for _ in range(5))
    assert best < ANSWER_SECONDS


def _seconds(command: list[str], home: Home) -> float:
    before = time.perf_counter()
    subprocess.run(command, env=home.environment(), capture_output=True, check=False)
    return time.perf_counter() - before


@pytest.mark.slow
def test_small_commands_import_nothing_heavy(home: Home) -> None:
    program = (
        "import sys, hpcfs.cli.main, hpcfs.cli.status, hpcfs.cli.umount, hpcfs.cli.mount,"
        " hpcfs.cli.cache, hpcfs.cli.sync, hpcfs.cli.retry, hpcfs.cli.discard, hpcfs.cli.recover,"
        " hpcfs.cli.watch;"
        "print(*sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program],
        env=home.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert HEAVY.isdisjoint(shown.stdout.split())


# --- init ---------------------------------------------------------------------------------------


def give_hosts(home: Home) -> None:
    (home.path / ".ssh").mkdir()
    (home.path / ".ssh" / "config").write_text(
        'Host login3 *.org\n  User me\nHost "gpu.box" a/b\nHost store\n'
    )
    (home.path / ".rclone.conf").write_text(
        "[store]\ntype = s3\naccess_key_id = AKID\nsecret_access_key = hunter2\n"
        "endpoint = minio:9000\n"
        "[far]\ntype = sftp\nhost = far.example.org\nport = 2222\n"
        "[bad]\ntype = sftp\n"
        "[drive]\ntype = drive\n"
    )
    tunnels = home.path / ".hpcfs" / "tunnels"
    tunnels.mkdir(parents=True)
    for name in ("my-laptop.json", "my-laptop-12345678.sock", ".half.json", "no name.json"):
        (tunnels / name).touch()


@pytest.mark.slow
def test_init_without_a_terminal_offers_all_commented_out(home: Home) -> None:
    give_hosts(home)
    result = home.run("init")
    assert result.returncode == 0
    text = home.config.read_text()
    assert stat.S_IMODE(home.config.stat().st_mode) == 0o600
    assert config.parse(text, home.config, needs_namespaces=False).namespaces == {}
    for name in ("login3", '"gpu.box"', "store", "my-laptop", "store-2", "far"):
        assert f"# [namespaces.{name}]\n" in text
    assert text.count("# from the tunnel") == 1
    assert "drive" not in text
    assert "*.org" not in text
    assert "hunter2" not in text
    assert "not offered" in result.stderr


@pytest.mark.slow
def test_every_offer_parses_once_it_is_uncommented(home: Home) -> None:
    give_hosts(home)
    assert home.run("init").returncode == 0
    head, _, examples = home.config.read_text().partition("# A cluster, by SSH")
    text = head.replace("# [", "[")
    for key in ("type", "host", "port", "tunnel", "bucket", "endpoint_url"):
        text = text.replace(f"# {key} =", f"{key} =")
    found = config.parse(text, home.config).namespaces
    assert found["gpu.box"].site == SshSite("gpu.box")
    assert found["far"].site == SshSite("far.example.org", port=2222)
    assert found["my-laptop"].url == "tunnel:my-laptop"
    assert found["store-2"].site == S3Site("https://minio:9000")
    rows = [row.removeprefix("# ") for row in examples.splitlines() if " = " in row or "[" in row]
    assert set(config.parse("\n".join(rows), home.config).namespaces) == {"home", "data", "laptop"}


@pytest.mark.slow
def test_init_does_not_replace_a_configuration_unasked(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text("# mine\n")
    result = home.run("init")
    assert result.returncode == 1
    assert "--force" in result.stderr
    assert home.config.read_text() == "# mine\n"
    assert home.run("init", "--force").returncode == 0
    assert home.config.read_text() != "# mine\n"
    assert [file.name for file in home.config.parent.iterdir()] == ["config.toml"]


@pytest.mark.slow
def test_init_asks_on_a_terminal(home: Home) -> None:
    give_hosts(home)
    terminal = Terminal(home, "init")
    answers = {"login3": "", "gpu.box": "n", "store": "n", "my-laptop": "", "far": "y"}
    for name, answer in answers.items():
        terminal.wait_for(f"Include {name} " if name != "gpu.box" else 'Include "gpu.box" ')
        terminal.write(f"{answer}\n")
    assert terminal.exit_code() == 0
    found = config.load(home.config).namespaces
    assert set(found) == {"login3", "my-laptop", "far"}


# --- check --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_check_goes_on_to_the_end_and_tells_by_its_exit_code(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text(
        f'mountpoint = "{home.mountpoint}"\ncache_size = "4096 TiB"\n'
        '[namespaces.ssh]\ntype = "sftp"\nhost = "127.0.0.1"\nport = 1\nconnect_timeout = 2\n'
        '[namespaces.s3]\ntype = "s3"\nbucket = "b"\nendpoint_url = "http://127.0.0.1:1"\n'
    )
    keys = {"AWS_ACCESS_KEY_ID": "AKID", "AWS_SECRET_ACCESS_KEY": "hunter2"}
    result = home.run("check", **keys)
    assert result.returncode == 1
    assert f"ok    mountpoint: {home.mountpoint}" in result.stdout
    assert "warn  cache: " in result.stdout
    assert "fail  ssh: 127.0.0.1 port 1: Connection refused" in result.stdout
    assert "warn  ssh: no key file and no agent" in result.stdout
    assert "ok    s3: credentials from env" in result.stdout
    assert "fail  s3: http://127.0.0.1:1 can't be reached" in result.stdout
    assert "hunter2" not in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_check_names_a_mistake_in_the_configuration(home: Home) -> None:
    home.config.parent.mkdir(parents=True)
    home.config.write_text("mountpiont = 1\n")
    result = home.run("check")
    assert result.returncode == 1
    assert f"fail  configuration: {home.config}:1: unknown key" in result.stdout


@contextmanager
def greeting(text: bytes) -> Iterator[int]:
    """A server that greets one client, and its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(text)

        thread = threading.Thread(target=greet)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join(10)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "level"), [(b"SSH-2.0-Test\r\n", "ok"), (b"220 mail.example.org\r\n", "fail")]
)
def test_check_tells_an_ssh_server_from_another(
    home: Home, text: bytes, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with greeting(text) as port:
        known, key = home.path / "known_hosts", home.path / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        known.write_text(f"[127.0.0.1]:{port} {(home.path / 'key.pub').read_text()}")
        ssh_config = home.path / "ssh_config"
        ssh_config.write_text(
            f"Host box\n HostName 127.0.0.1\n Port {port}\n UserKnownHostsFile {known}\n"
        )
        site = SshSite("box", ssh_config=str(ssh_config), identity_file=str(key))
        found = list(check_ssh.ssh_namespace("box", site))
    assert [one.level for one in found] == ["ok", level, "ok", "ok"]
    assert f"box means {getpass.getuser()}@127.0.0.1 port {port}" in found[0].text


@pytest.mark.slow
def test_check_does_not_try_a_host_behind_a_jump(home: Home) -> None:
    ssh_config = home.path / "ssh_config"
    ssh_config.write_text(
        f"Host inner\n HostName 192.0.2.1\n ProxyJump me@gate:2200\nHost *\n"
        f" UserKnownHostsFile {home.path}/no\n"
    )
    found = list(check_ssh.ssh_namespace("inner", SshSite("inner", ssh_config=str(ssh_config))))
    assert [one.level for one in found[:3]] == ["ok", "warn", "warn"]
    assert "through me@gate port 2200, which is not tried" in found[0].text
    assert "[gate]:2200 is not known" in found[1].text


@pytest.mark.slow
def test_check_tells_what_ssh_makes_of_a_host_and_what_hpcfs_cannot_obey(home: Home) -> None:
    (home.path / ".ssh").mkdir(exist_ok=True)
    (home.path / ".ssh" / "config").write_text(
        "Host box\n HostName 192.0.2.1\n Port 2022\n User CAMPUS\\alice\n ProxyCommand nc %h %p\n"
        " ControlMaster auto\n StrictHostKeyChecking yes\n"
        "Host other\n BindInterface eth7\n"
    )
    result = home.run("check", "box", "other")
    text = " ".join(result.stdout.split())
    assert (
        "ok box: box means CAMPUS\\alice@192.0.2.1 port 2022, through 'nc 192.0.2.1 2022'" in text
    )
    assert "warn box: in the SSH configuration ControlMaster auto is passed over" in text
    assert "fail box: the host key of [192.0.2.1]:2022 is not known, and StrictHostKeyCh" in text
    assert "fail other: the SSH configuration for other has BindInterface eth7" in text
    assert result.returncode == 1


def test_check_names_unreadable_files(home: Home) -> None:
    site = SshSite("h", identity_file=str(home.path / "no"))
    assert [one.level for one in check_ssh.ssh_namespace("h", site)] == ["fail"]


def test_check_misses_the_program_of_a_transport(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(home.path))
    (found,) = check_ssh.ssh_namespace("h", SshSite("h", transport="openssh"))
    assert (found.level, "openssh-client" in found.text) == ("fail", True)


@pytest.mark.slow
def test_check_tells_what_is_wrong_with_a_bucket(tmp_path: Path) -> None:
    with s3.rclone_s3(tmp_path) as server:
        keys = (Secret(server.access_key), Secret(server.secret_key))
        site = S3Site(server.endpoint_url, server.region, None, *keys)
        wrong = S3Site(server.endpoint_url, server.region, None, keys[0], Secret("x" * 40))
        fine = list(check_s3.s3_namespace("b", site, S3Root(server.bucket)))
        absent = list(check_s3.s3_namespace("b", site, S3Root("no-such-bucket")))
        refused = list(check_s3.s3_namespace("b", wrong, S3Root(server.bucket)))
    assert [one.level for one in fine] == ["ok", "ok"]
    assert absent[-1].level == "fail"
    assert "no such bucket" in absent[-1].text
    assert refused[-1].level == "fail"
    assert "correct the credentials" in refused[-1].text


@pytest.mark.slow
def test_check_misses_credentials(
    home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in list(os.environ):
        if variable.startswith("AWS_"):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(home.path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3.rclone_s3(tmp_path / "buckets") as server:
        site = S3Site(server.endpoint_url, server.region)
        found = list(check_s3.s3_namespace("b", site, S3Root(server.bucket)))
    assert [one.level for one in found] == ["ok", "fail"]
    assert "not public" in found[1].text
    assert "aws configure" in found[1].text
    found = list(check_s3.s3_namespace("b", S3Site(profile="no-such"), S3Root("b")))
    assert [one.level for one in found] == ["fail"]
    assert "no-such" in found[0].text
