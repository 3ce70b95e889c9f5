"""Machines with networks of their own, on this one: namespaces of Linux (namespaces(7)), joined by
cables (veth(4)). Each has its own interfaces, ports, mounts and host name, and the file system of
this machine below. Needs root."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.support.mounts import run

_BEGIN = "echo {name} >/proc/sys/kernel/hostname && ip link set lo up && echo ready && exec cat"


class Node:
    """A machine. It ends with this process: what holds it waits for the end of a pipe."""

    def __init__(self, name: str) -> None:
        self.name = name
        command = ["unshare", "--net", "--mount", "--uts", "sh", "-c", _BEGIN.format(name=name)]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self._holder.pid
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n", "no namespaces: that needs root"

    @property
    def enter(self) -> tuple[str, ...]:
        """Put before a command, it runs there, in the directory `/`."""
        return ("nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--")

    def run(self, *command: str | bytes | Path) -> str:
        return run(*self.enter, *command)

    def can_reach(self, host: str, port: int) -> bool:
        script = f"exec 3<>/dev/tcp/{host}/{port}"
        command = [*self.enter, "timeout", "3", "bash", "-c", script]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def sockets(self, state: str) -> str:
        """TCP sockets in that state, as ss(8) lists them."""
        return self.run("ss", "-Htn", "state", state)

    def close(self) -> None:
        """With all that runs there; its mounts go with it."""
        here = os.readlink(f"/proc/{self.pid}/ns/net")
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it just ended
                if os.readlink(process / "ns" / "net") == here:
                    os.kill(int(process.name), signal.SIGKILL)
        self._holder.communicate(timeout=20)


def cable(one: Node, other: Node, network: str) -> None:
    """`one` has the first address of `network` (a.b.c), `other` the second. At each end the
    interface is named after who is at the other one."""
    ends = ((one, other.name, 1), (other, one.name, 2))
    near = ("link", "add", other.name, "netns", str(one.pid), "type", "veth")
    run("ip", *near, "peer", "name", one.name, "netns", str(other.pid))
    for node, interface, number in ends:
        node.run("ip", "address", "add", f"{network}.{number}/24", "dev", interface)
        node.run("ip", "link", "set", interface, "up")
