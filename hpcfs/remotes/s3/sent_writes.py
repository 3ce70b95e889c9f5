"""Whether a request that changes an object may have reached the server.

NotConnected tells the daemon that an upload changed nothing, so that it still knows the remote's
version. Of several requests, or of several attempts of one, the last error does not say that: the
attempt before it may have been lost on its way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hpcfs.model.errors import NotConnected, Unreachable
from hpcfs.remotes.s3.translate import is_of_connecting

_WRITING = ("put_object", "copy_object", "complete_multipart_upload")
_WRITING_NAMES = ("PutObject", "CopyObject", "CompleteMultipartUpload")


class _Trace:
    """What one upload has sent; the tasks that it starts share it."""

    sent = False


_current: ContextVar[_Trace | None] = ContextVar("_current", default=None)


@contextmanager
def tracing_writes() -> Iterator[None]:
    """Around an upload: NotConnected passes only if nothing that writes may have been sent, and
    becomes Unreachable otherwise."""
    trace = _Trace()
    token = _current.set(trace)
    try:
        yield
    except NotConnected as error:
        if trace.sent:
            raise Unreachable(*error.args) from error
        raise
    finally:
        _current.reset(token)


def note_sent(operation: str) -> None:
    """Note that a request may have reached the server; `operation` is the client's method."""
    trace = _current.get()
    if trace is not None and operation in _WRITING:
        trace.sent = True


def note_client_attempt(
    operation: Any = None, caught_exception: Exception | None = None, **_: object
) -> None:
    """Note an attempt of botocore, which tells each one (the event "needs-retry")."""
    name = getattr(operation, "name", "")
    not_sent = caught_exception is not None and is_of_connecting(caught_exception)
    if name in _WRITING_NAMES and not not_sent:
        note_sent(_WRITING[_WRITING_NAMES.index(name)])
