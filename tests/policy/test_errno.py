"""Every error has an errno that somebody chose."""

from __future__ import annotations

import errno

import pytest

from hpcfs.kernel.errno import ERRNO, errno_of
from hpcfs.model import errors
from hpcfs.model.errors import (
    Changed,
    FilesystemError,
    RemoteError,
    RemoteFailure,
    Stale,
    TimedOut,
)
from hpcfs.protocol.messages import ERRORS, Failure


def _all(base: type[Exception]) -> set[type[Exception]]:
    return {base}.union(*(_all(child) for child in base.__subclasses__()))


def _is_ours(kind: type[Exception]) -> bool:
    """Tests define subclasses too, and so does `hpcfs tunnel`, which answers no kernel and no
    daemon."""
    module = kind.__module__
    return module.startswith("hpcfs.") and not module.startswith("hpcfs.laptop.")


OURS = {kind for kind in _all(RemoteError) | _all(FilesystemError) if _is_ours(kind)}


def test_every_class_has_its_own_entry_and_nothing_else_has() -> None:
    assert ERRNO.keys() == OURS


@pytest.mark.parametrize("kind", sorted(OURS, key=lambda kind: kind.__name__))
def test_an_error_gets_its_classs_errno(kind: type[Exception]) -> None:
    assert errno_of(kind("a sentence")) == ERRNO[kind]
    assert ERRNO[kind] in errno.errorcode


def test_the_errnos_that_programs_and_the_kernel_act_upon() -> None:
    assert ERRNO[Stale] == ERRNO[Changed] == errno.ESTALE  # open(2) looks the name up again
    assert ERRNO[TimedOut] == errno.ETIMEDOUT


def test_what_is_no_error_of_ours_has_none() -> None:
    assert errno_of(ValueError("a bug")) is None
    assert errno_of(OSError(errno.ENOSPC, "full")) is None


def test_a_class_added_later_takes_its_bases_errno() -> None:
    class Later(TimedOut):
        """Not in the table."""

    assert errno_of(Later("x")) == errno.ETIMEDOUT


def test_every_remote_error_crosses_the_socket() -> None:
    for kind in _all(RemoteError):
        if _is_ours(kind):
            again = Failure.of(kind("why")).error()
            assert (type(again), again.message) == (kind, "why")
            assert ERRORS[kind.__name__] is kind
    assert type(Failure("FromTheFuture", "why").error()) is RemoteFailure


def _drawn(tree: str) -> list[tuple[str, str]]:
    """(class, base) of each line of an indented tree; the root's base is Exception."""
    above = ["Exception"]
    found = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 4
        del above[depth:]
        found.append((line.strip(), above[-1]))
        above.append(line.strip())
    return found


def test_the_tree_at_the_top_of_the_module_shows_all_classes_in_their_order() -> None:
    assert errors.__doc__
    tree = "\n".join(line for line in errors.__doc__.splitlines() if line.startswith("    "))
    classes = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    assert _drawn(tree) == [(kind.__name__, kind.__base__.__name__) for kind in classes]


def test_every_error_says_when_it_is_raised() -> None:
    for kind in OURS:
        assert (kind.__doc__ or "").startswith("Raised "), kind
