"""The program that `ssh` runs to ask the user something: it asks the process that started ssh
(askpass_server.py).

Run by its path, isolated and without a site: nothing but the standard library may be imported, and
little of that, since a user waits for it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

SOCKET_VARIABLE = "HPCFS_ASKPASS_SOCKET"
ANSWERED = b"+"
"""Goes before an answer, so that an empty one differs from none."""


def main() -> int:
    """Prints what the user typed. Where nobody could be asked, or that process is gone, ssh
    must not go on: it would send an empty password, and sites ban addresses for that. Ours runs in
    a process group of its own, with whatever carries it (a ProxyJump's ssh, a ProxyCommand)."""
    text = sys.argv[1] if len(sys.argv) > 1 else ""
    if os.environ.get("SSH_ASKPASS_PROMPT") == "none":  # a notice: "touch the key"
        sys.stderr.write(text + "\n")
        return 0
    answer = _ask(text)
    if not answer.startswith(ANSWERED):
        os.killpg(os.getpgrp(), signal.SIGTERM)
    sys.stdout.buffer.write(answer[len(ANSWERED) :] + b"\n")
    return 0


def _ask(text: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(os.environ[SOCKET_VARIABLE])
            connection.sendall(os.fsencode(text))
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))
        except OSError as error:
            sys.stderr.write(f"hpcfs can't be asked: {error}\n")
            return b""


if __name__ == "__main__":
    sys.exit(main())
