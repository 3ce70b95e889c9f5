"""Guards botocore's way over the network: aiobotocore speaks HTTP by aiohttp, which follows
redirects by itself, with the session token and the body, to any host and from https to http; and
reads answers of any length.

`guard` ends both for every session that aiobotocore makes, those of credential providers (STS,
SSO, instances, containers) included, none of which takes an option for it: so its one method that
hands out aiohttp's sessions is replaced. S3's own redirects to a bucket's region are not of this
kind: botocore makes them out of the region's name, and signs the request anew.
"""

from __future__ import annotations

from typing import Any

from aiobotocore.httpsession import AIOHTTPSession

from hpcfs.remotes.s3.responses import is_fit_to_parse, is_page

ANSWER_BYTES = 16 * 1024 * 1024
"""Of listings, refusals and credentials; a page has 1000 keys of at most 1 KiB, thrice that when
quoted. Whoever reads an object bounds it."""
PIECE_BYTES = 64 * 1024


class UnfitResponse(Exception):
    """An answer that is not parsed: of more than ANSWER_BYTES, or one that would become so."""


class _BoundedResponse:
    """aiohttp's answer. `read` is bounded; the body of an object is read by way of `content`."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer
        self._body: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answer, name)

    async def read(self) -> bytes:
        if self._body is None:
            try:
                self._body = self._fit(await _bounded(self._answer.content))
            except BaseException:
                self._answer.close()
                raise
            self._answer.release()
        return self._body

    def _fit(self, body: bytes) -> bytes:
        """Return a body that may be parsed. Of a refusal the status says enough, and proxies send
        pages of HTML beside it. Raises UnfitResponse."""
        if self._answer.status >= 300:
            return body if is_fit_to_parse(body) else b""
        if is_page(self._answer.headers, body):
            raise UnfitResponse("the answer of the S3 server is a web page")
        if not is_fit_to_parse(body):
            raise UnfitResponse("the answer of the S3 server is not safe to parse")
        return body


async def _bounded(content: Any) -> bytes:
    """Read a body. Raises UnfitResponse where it is too long."""
    body = bytearray()
    while piece := await content.read(PIECE_BYTES):
        body += piece
        if len(body) > ANSWER_BYTES:
            raise UnfitResponse("the answer of the S3 server is too long")
    return bytes(body)


class _BoundedSession:
    """aiohttp's session, as far as aiobotocore uses it."""

    def __init__(self, session: Any) -> None:
        self._session = session

    async def request(self, method: str, **options: Any) -> _BoundedResponse:
        answer = await self._session.request(method, **{**options, "allow_redirects": False})
        return _BoundedResponse(answer)


_handing_out: Any = AIOHTTPSession._get_session
"""A version of aiobotocore without it is not known to be safe: the import fails."""


async def _guarded(self: AIOHTTPSession, proxy_url: str | None) -> _BoundedSession:
    session = await _handing_out(self, proxy_url)
    # aiohttp would repeat a request by itself, PUT too, and tell the last attempt's error only:
    # botocore repeats it, and tells each (sent_writes.py).
    session._retry_connection = False
    return _BoundedSession(session)


def guard() -> None:
    """Install the guard in this process. Calling it again changes nothing."""
    AIOHTTPSession._get_session = _guarded
