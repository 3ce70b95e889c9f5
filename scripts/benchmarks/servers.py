"""The servers of the measurements: SSH, S3, a plain TCP peer, and the link to them.

The SSH server and the code to start it are the tests'. All servers serve the same files. Without a
delay clients connect to them directly, otherwise over a link (wan.py) in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from scripts.benchmarks import tunnels
from tests.support.s3 import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, rclone_binary
from tests.support.sshd import LOOPBACK, free_port, ssh_server

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 30.0
CHUNK = bytes(1024 * 1024)


@dataclass(frozen=True)
class Place:
    """How a client reaches a remote: its port and keys."""

    remote: str
    port: int
    files: Path
    """The served directory, as the SSH server calls it; over S3 it is the bucket's root."""
    ssh_config: Path
    known_hosts: Path
    key: Path
    user: str
    rendezvous: Path | None = None
    """The directory of the tunnel's file, for a laptop."""

    @property
    def endpoint_url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"


class Servers:
    """The servers, which run until the block of `serving` ends."""

    def __init__(self, directory: Path, files: Path, stack: ExitStack, remotes: list[str]) -> None:
        self._directory = directory
        self._files = files
        # No session may wait for another's login: eight readers connect at once.
        options = ("MaxStartups 100", "MaxSessions 100")
        home = f"internal-sftp -d {directory}"
        self._sshd = stack.enter_context(ssh_server(directory / "sshd", *options, subsystem=home))
        self._ports = {"sftp": self._sshd.port, "tcp": stack.enter_context(_tcp_peer())}
        self._ports["tunnel"] = self._sshd.port
        if "s3" in remotes:
            self._ports["s3"] = stack.enter_context(_s3_server(files.parent))

    def remove(self, remote: str, name: str) -> None:
        """Remove what was written, or a part of it, and unfinished uploads."""
        if remote == "s3":
            # Not directly on its disk: it caches the content of directories.
            with S3Server(f"http://{LOOPBACK}:{self._ports[remote]}").client() as client:
                _remove_objects(client, name)
        written = self._files / name
        if written.is_dir():
            shutil.rmtree(written)
        written.unlink(missing_ok=True)

    @contextmanager
    def at(self, remote: str, rtt_ms: float, rate_mbits: float) -> Iterator[Place]:
        """Yield the way to a remote: over a link of that delay, or directly where there is none."""
        port = self._ports[remote]
        with ExitStack() as stack:
            if rtt_ms:
                port = stack.enter_context(link(port, rtt_ms, rate_mbits))
            place = self._place(remote, port)
            if remote == "tunnel":
                place = stack.enter_context(self._laptop(place))
            yield place

    @contextmanager
    def _laptop(self, login: Place) -> Iterator[Place]:
        """Yield a laptop behind the login node at that place, as it is reached from there."""
        rendezvous = self._directory / ".hpcfs" / "tunnels"
        home = Path(mkdtemp(prefix="laptop-", dir=self._directory))
        with (
            tunnels.hpcfs_tunnel(login.ssh_config, self._files, home, rendezvous, REPOSITORY),
            tunnels.ssh_tunnel(login.ssh_config, self._sshd.port) as port,
        ):
            yield replace(self._place("tunnel", port), rendezvous=rendezvous)

    def _place(self, remote: str, port: int) -> Place:
        directory = self._directory / f"{remote}-{port}"
        directory.mkdir(exist_ok=True)
        known_hosts, ssh_config = directory / "known_hosts", directory / "ssh_config"
        line = self._sshd.known_hosts_line(self._sshd.host_key)
        known_hosts.write_text(line.replace(f":{self._sshd.port} ", f":{port} "))
        text = self._sshd.config_text().replace(f"Port {self._sshd.port}", f"Port {port}")
        ssh_config.write_text(text.replace(str(self._sshd.known_hosts), str(known_hosts)))
        return Place(
            remote, port, self._files, ssh_config, known_hosts, self._sshd.key, self._sshd.user
        )


@contextmanager
def serving(directory: Path, files: Path, remotes: list[str]) -> Iterator[Servers]:
    """Run the servers. `files` is named as the bucket; its present content must not change any
    more."""
    with ExitStack() as stack:
        yield Servers(directory, files, stack, remotes)


@contextmanager
def link(port: int, rtt_ms: float, rate_mbits: float) -> Iterator[int]:
    """Run a link, and yield its own port; it leads to `port` of this machine."""
    options = ["--to", f"{LOOPBACK}:{port}", "--rtt", str(rtt_ms), "--rate", str(rate_mbits)]
    process = _start("scripts.benchmarks.wan", *options, "--until-stdin-ends")
    try:
        yield _port_of(process)
    finally:
        if _end(process):
            raise RuntimeError("the emulated link failed: its traceback is above")


def _start(name: str, *options: str) -> subprocess.Popen[bytes]:
    """Start a module as a process that prints its port and ends with its standard input."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", name, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        start_new_session=True,  # Ctrl-C is for the benchmark, which ends its links last
    )


def _port_of(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def _end(process: subprocess.Popen[bytes]) -> int:
    """End the process; return its exit code."""
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdin.close()
    process.stdout.close()
    return process.wait(START_SECONDS)


# --- S3 -------------------------------------------------------------------------------------------


@contextmanager
def _s3_server(directory: Path) -> Iterator[int]:
    """Run an S3 server, whose buckets are the folders of `directory`."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(str(rclone_binary()), "serve", "s3", "--addr", f"{LOOPBACK}:{port}"),
            *("--config", os.devnull, "--vfs-cache-mode", "off"),
            # Nobody else changes the files: neither directories nor checksums are read again.
            *("--dir-cache-time", "720h", "--poll-interval", "0", str(directory)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{SECRET_KEY}"'},
        start_new_session=True,
    )
    try:
        _wait_for(process, port)
        _ask_for_everything(port)
        yield port
    finally:
        process.kill()
        process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((LOOPBACK, port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError("the S3 server (rclone serve s3, version 1.65 or later) did not start")


def _ask_for_everything(port: int) -> None:
    """Have the server compute each object's checksum, which it does once and must not do in a
    measurement."""
    with S3Server(f"http://{LOOPBACK}:{port}").client() as client:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
            for found in page["Contents"]:
                client.head_object(Bucket=BUCKET, Key=found["Key"])


def _remove_objects(client: Any, name: str) -> None:
    try:
        uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
    except client.exceptions.NoSuchUpload:  # rclone's server: none was ever begun
        return
    for upload in uploads:
        client.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=name):
        for found in page.get("Contents", ()):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])


# --- the reference --------------------------------------------------------------------------------


@contextmanager
def _tcp_peer() -> Iterator[int]:
    """Run the plain TCP peer in a process of its own. On each connection a line requests that many
    bytes, or, with a minus, announces them."""
    process = _start("scripts.benchmarks.servers")
    try:
        yield _port_of(process)
    finally:
        _end(process)


def plain_tcp_seconds(port: int, size: int, timeout: float, *, upload: bool = False) -> float:
    """Return the seconds of one transfer on an open connection: down from the request to the last
    byte, up from the first byte to the peer's answer that it has the last one."""
    with socket.create_connection((LOOPBACK, port), timeout) as connection:
        connection.sendall(b"0\n")
        connection.recv(1)
        started = time.monotonic()
        connection.sendall(b"%d\n" % (-size if upload else size))
        if upload:
            _send(connection, size)
            _receive(connection, 1)
        else:
            _receive(connection, size)
        return time.monotonic() - started


def _send(connection: socket.socket, size: int) -> None:
    for start in range(0, size, len(CHUNK)):
        connection.sendall(CHUNK[: size - start])


def _receive(connection: socket.socket, size: int) -> None:
    buffer = bytearray(len(CHUNK))
    while size:
        count = connection.recv_into(buffer, min(size, len(buffer)))
        if not count:
            raise ConnectionError("the plain TCP peer ended early")
        size -= count


def _do_what_is_asked_for(connection: socket.socket) -> None:
    # The link resets what it still has when it is taken down.
    with suppress(ConnectionError), connection, connection.makefile("rb", buffering=0) as requests:
        for line in requests:
            if (size := int(line)) > 0:
                _send(connection, size)
            else:
                _receive(connection, -size)
                connection.sendall(b"0")


def main() -> None:
    """Serve as the plain TCP peer until stdin ends."""
    listener = socket.create_server((LOOPBACK, 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_do_what_is_asked_for, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
