"""Every error has an errno that somebody chose."""

from __future__ import annotations

import errno

import pytest

from hpcfs.kernel.errno import ERRNO, errno_of
from hpcfs.model.errors import (
    ERRORS,
    Changed,
    Failure,
    FilesystemError,
    RemoteError,
    RemoteFailure,
    Stale,
    TimedOut,
)


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
