"""Whether a request that changes an object may have reached the server.

NotConnected tells the daemon that a change was not made, so that it still knows the remote's
version, and may ask for it again. Of several requests, or of several attempts of one, the last
error does not say that: the attempt before it may have been lost on its way back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from hpcfs.model.errors import NotConnected, Unreachable
from hpcfs.remotes.s3.translate import is_of_connecting

_WRITING = {
    "PutObject": "put_object",
    "CopyObject": "copy_object",
    "CompleteMultipartUpload": "complete_multipart_upload",
    "DeleteObject": "delete_object",
    "DeleteObjects": "delete_objects",
}
"""The client's methods, by the operations' names."""


P = ParamSpec("P")
T = TypeVar("T")


class _Trace:
    """What one change has sent; the tasks that it starts share it."""

    sent = False


_current: ContextVar[_Trace | None] = ContextVar("_current", default=None)


@contextmanager
def tracing_writes() -> Iterator[None]:
    """Around a change: NotConnected passes only if nothing that writes may have been sent, and
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


def traced(change: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Decorate a method that changes objects by several requests: see `tracing_writes`."""

    @wraps(change)
    async def within_trace(*args: P.args, **kwargs: P.kwargs) -> T:
        with tracing_writes():
            return await change(*args, **kwargs)

    return within_trace


def note_sent(operation: str) -> None:
    """Note that a request may have reached the server; `operation` is the client's method."""
    trace = _current.get()
    if trace is not None and operation in _WRITING.values():
        trace.sent = True


def note_client_attempt(
    operation: Any = None, caught_exception: Exception | None = None, **_: object
) -> None:
    """Note an attempt of botocore, which tells each one (the event "needs-retry")."""
    name = getattr(operation, "name", "")
    not_sent = caught_exception is not None and is_of_connecting(caught_exception)
    if name in _WRITING and not not_sent:
        note_sent(_WRITING[name])
