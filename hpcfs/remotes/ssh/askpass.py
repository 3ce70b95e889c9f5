"""The program that `ssh` runs to ask the user something: it asks the transfer process (asking.py).

Run by its path, isolated and without a site: nothing but the standard library may be imported, and
little of that, since a user waits for it.
"""

from __future__ import annotations

import os
import socket
import sys

SOCKET_VARIABLE = "HPCFS_ASKPASS_SOCKET"
ANSWERED = b"+"
"""Goes before an answer, so that an empty one differs from none."""


def main() -> int:
    """Prints what the user typed. The exit code is 1 where nobody could be asked."""
    text = sys.argv[1] if len(sys.argv) > 1 else ""
    if os.environ.get("SSH_ASKPASS_PROMPT") == "none":  # a notice: "touch the key"
        sys.stderr.write(text + "\n")
        return 0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SOCKET_VARIABLE])
        connection.sendall(os.fsencode(text))
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    if not answer.startswith(ANSWERED):
        return 1
    sys.stdout.buffer.write(answer[len(ANSWERED) :] + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
