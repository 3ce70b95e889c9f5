"""What a change that was given up leaves: the remote may have carried it out, or do it still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

from hpcfs.inodes.tree import Node, Tree
from hpcfs.model.errors import NotConnected, Unreachable


@contextmanager
def doubting(tree: Tree, *names: tuple[Node, bytes]) -> Iterator[None]:
    """Surround a change of these names on the remote. If its caller is interrupted, or its answer
    is lost, nothing is believed of them until the remote is asked."""
    try:
        yield
    except NotConnected:
        raise  # nothing was sent
    except (trio.Cancelled, Unreachable):
        for parent, name in names:
            tree.doubt(parent, name)
        raise
