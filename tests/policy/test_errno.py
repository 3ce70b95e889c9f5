"""Every error that the filesystem or a remote can raise has an errno of its own choosing."""

from __future__ import annotations

import errno
import inspect

import pytest

from hpcfs.filesystem import errors
from hpcfs.kernel.errno import ERRNO, errno_of
from hpcfs.transfer import messages

OURS = [
    found
    for module in (errors, messages)
    for _, found in inspect.getmembers(module, inspect.isclass)
    if issubclass(found, errors.FilesystemError | messages.RemoteError)
]


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_every_error_is_in_the_table(kind: type[Exception]) -> None:
    assert kind in ERRNO
    assert errno_of(kind("a sentence")) == ERRNO[kind]


@pytest.mark.parametrize("number", sorted(set(ERRNO.values())))
def test_every_errno_is_one(number: int) -> None:
    assert number in errno.errorcode


def test_nothing_says_that_a_directory_ended() -> None:
    """glibc's readdir(3) takes ENOENT for the end of the directory: an unreachable namespace would
    list as empty, and `rsync --delete` would believe it."""
    site_wide = [kind for kind in messages.ERRORS.values() if kind.lasting]
    site_wide += [messages.Unreachable, messages.TimedOut]
    assert all(ERRNO[kind] != errno.ENOENT for kind in site_wide)


def test_what_is_not_ours_has_no_errno() -> None:
    assert errno_of(ValueError("a bug")) is None


def test_errors_cross_the_seam_unchanged() -> None:
    for kind in messages.ERRORS.values():
        error = messages.Failure.of(kind("a sentence")).error()
        assert type(error) is kind
        assert error.message == "a sentence"
