"""Starts the demo's remotes: a private directory, an environment, and the processes in it.

Nothing of the user's takes part: not ~/.ssh, ~/.aws, a running agent, a proxy, nor the user's
configuration and cache. Only the runtime directory stays, so that `hpcfs status` finds the mount
from any terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from pathlib import Path

from hpcfs.model.errors import SetupError
from hpcfs.system import interpreter, temporary

STOP_SECONDS = 10.0


@contextmanager
def remotes() -> Iterator[Path]:
    """Run servers and laptop until the block ends; yield their directory with the mount's
    config.toml.

    Raises SetupError. Changes this process's environment to one in which the mount finds only the
    demo's files.
    """
    with temporary.directory("hpcfs-demo-") as made:
        directory = made.resolve()
        seclude(os.environ, directory)
        with _process("servers", directory), _process("laptop", directory):
            yield directory


def seclude(environ: MutableMapping[str, str], directory: Path) -> None:
    """Point the environment to the demo's files, and drop variables that lead to the user's."""
    for name in [name for name in environ if name.startswith("AWS_")]:
        del environ[name]
    environ.pop("SSH_AUTH_SOCK", None)
    for kind in ("CONFIG", "CACHE", "STATE"):
        environ[f"XDG_{kind}_HOME"] = str(directory / kind.lower())
    environ["AWS_SHARED_CREDENTIALS_FILE"] = str(directory / "aws_credentials")
    environ["AWS_CONFIG_FILE"] = os.devnull
    environ["NO_PROXY"] = environ["no_proxy"] = "127.0.0.1"


@contextmanager
def _process(name: str, directory: Path) -> Iterator[None]:
    """Run hpcfs/demo/NAME.py; the block begins when it has reported that it is up."""
    log_file = directory / f"{name}.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            interpreter.command(f"hpcfs.demo.{name}", str(directory)),
            cwd=interpreter.SAFE_DIRECTORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the demo, which ends its servers last
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SetupError(f"the demo's {name} did not start{_last_line(log_file)}")
        if failure := line.strip():
            raise SetupError(f"{failure}{_last_line(log_file)}")
        yield
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """Close its stdin, at which it ends; if it does not, kill its process group."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):  # it ended this moment
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").strip().splitlines()
    return f" ({lines[-1]})" if lines else ""
