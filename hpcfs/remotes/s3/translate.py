"""Translates the exceptions of botocore and aiohttp to RemoteErrors: the only such table."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError

from hpcfs.model.errors import (
    AccessRefused,
    AlreadyExists,
    Changed,
    InvalidName,
    InvalidRequest,
    IsADirectory,
    NameTooLong,
    NoSpace,
    NotADirectory,
    NotConnected,
    NotFound,
    NotSupported,
    PermissionDenied,
    ProtocolError,
    RemoteError,
    RemoteFailure,
    Throttled,
    TimedOut,
    TooLarge,
    Unreachable,
    WrongSettings,
)
from hpcfs.remotes.s3.botocore_guard import UnfitResponse
from hpcfs.remotes.s3.pool import NotOpened
from hpcfs.system.text import printable

CAUGHT = (
    *(boto.BotoCoreError, boto.ClientError, aiohttp.ClientError, OSError, ValueError),
    ResponseParserError,
    RecursionError,  # botocore's parsers, and json's, call themselves for what is inside
)
"""ValueError is what botocore raises for numbers and times that are none; TimeoutError is an
OSError."""

LOGIN_ADVICE = (
    "check the profile or keys (for single sign-on: run `aws sso login`), then 'hpcfs login'"
)

_CODES: dict[str, tuple[type[RemoteError], str]] = {
    "InvalidAccessKeyId": (AccessRefused, f"S3 does not know the access key: {LOGIN_ADVICE}"),
    "SignatureDoesNotMatch": (AccessRefused, f"S3 refused the secret key: {LOGIN_ADVICE}"),
    "ExpiredToken": (AccessRefused, f"the S3 credentials have expired: {LOGIN_ADVICE}"),
    "InvalidToken": (AccessRefused, f"S3 refused the session token: {LOGIN_ADVICE}"),
    "RequestTimeTooSkewed": (
        AccessRefused,
        "S3 refused the request because this machine's clock is wrong: set it, then run "
        "'hpcfs login'",
    ),
    "NoSuchBucket": (WrongSettings, "there is no such bucket: check `bucket` and `endpoint_url`"),
    "InvalidBucketName": (WrongSettings, "this is no bucket name: check `bucket`"),
    "PermanentRedirect": (WrongSettings, "the bucket is in another region: set `region`"),
    "AccessDenied": (PermissionDenied, "S3 denies access: ask the bucket's owner for permission"),
    "NoSuchKey": (NotFound, "there is no such object"),
    "NoSuchUpload": (Changed, "the upload was ended on the server: write the file again"),
    "PreconditionFailed": (Changed, "the object has changed on the server: open it again"),
    "InvalidRange": (Changed, "the object has become shorter on the server: open it again"),
    "KeyTooLongError": (NameTooLong, "the path is longer than S3 accepts"),
    "InvalidObjectName": (InvalidName, "the server can't hold this name: choose another"),
    "EntityTooLarge": (TooLarge, "the file is larger than S3 accepts"),
    "MetadataTooLarge": (
        NoSpace,
        "the object's attributes are more than S3 accepts: remove some with setfattr -x",
    ),
    "QuotaExceeded": (NoSpace, "the S3 storage quota is used up: remove something"),
    "NotImplemented": (NotSupported, "this S3 server can't do that"),
    "InvalidObjectState": (
        PermissionDenied,
        "the object is archived: restore it with the provider's tools before reading it",
    ),
    "SlowDown": (Throttled, "S3 asks to slow down, and went on doing so: try again later"),
    "ServiceUnavailable": (Unreachable, "S3 is not available now: try again later"),
    "ExistingObjectIsDirectory": (IsADirectory, "the server has a directory of this name"),
    "ObjectParentIsFile": (NotADirectory, "a part of the path is a file on the server"),
    "BucketAlreadyExists": (AlreadyExists, "the name is taken"),
}

_SAME = {
    "ExpiredTokenException": "ExpiredToken",
    "TokenRefreshRequired": "ExpiredToken",
    "RequestExpired": "ExpiredToken",
    "InvalidClientTokenId": "InvalidAccessKeyId",
    "UnrecognizedClientException": "InvalidAccessKeyId",
    "AuthFailure": "SignatureDoesNotMatch",
    "AuthorizationHeaderMalformed": "PermanentRedirect",
    "IllegalLocationConstraintException": "PermanentRedirect",
    "301": "PermanentRedirect",
    "AllAccessDisabled": "AccessDenied",
    "AccountProblem": "AccessDenied",
    "403": "AccessDenied",
    "404": "NoSuchKey",
    "NotFound": "NoSuchKey",
    "409": "PreconditionFailed",
    "ConditionalRequestConflict": "PreconditionFailed",
    "OperationAborted": "PreconditionFailed",
    "412": "PreconditionFailed",
    "416": "InvalidRange",
    "XMinioInvalidObjectName": "InvalidObjectName",
    "XMinioParentIsObject": "ObjectParentIsFile",
    "MaxSizeExceeded": "EntityTooLarge",
    "XMinioStorageFull": "QuotaExceeded",
    "507": "QuotaExceeded",
    "MethodNotAllowed": "NotImplemented",
    "405": "NotImplemented",
    "501": "NotImplemented",
    "RequestLimitExceeded": "SlowDown",
    "Throttling": "SlowDown",
    "ThrottlingException": "SlowDown",
    "ThrottledException": "SlowDown",
    "RequestThrottled": "SlowDown",
    "RequestThrottledException": "SlowDown",
    "TooManyRequests": "SlowDown",
    "TooManyRequestsException": "SlowDown",
    "BandwidthLimitExceeded": "SlowDown",
    "ServerBusy": "SlowDown",
    "429": "SlowDown",
    "502": "ServiceUnavailable",
    "503": "ServiceUnavailable",
    "504": "ServiceUnavailable",
}

_PASSING = frozenset({"InternalError", "RequestTimeout", "RequestTimeoutException"})
_REDIRECTS = frozenset({300, 301, 302, 303, 305, 307, 308})

_NO_CREDENTIALS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.NoAuthTokenError,
)
_WRONG_SETTINGS = (
    boto.ProfileNotFound,
    boto.NoRegionError,
    boto.InvalidRegionError,
    boto.ConfigParseError,
    boto.ConfigNotFound,
    boto.UnknownEndpointError,
    boto.InvalidEndpointDiscoveryConfigurationError,
)
_UNREACHABLE = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    aiohttp.ClientError,
    OSError,
)
_NOT_CONNECTED = (
    NotOpened,
    boto.EndpointConnectionError,
    boto.ProxyConnectionError,
    boto.ConnectTimeoutError,
    aiohttp.ClientConnectorError,
    ConnectionRefusedError,
    socket.gaierror,
)
_TIMEOUTS = (boto.ReadTimeoutError, TimeoutError)


def translate(error: Exception, subject: str) -> RemoteError:
    """Return the RemoteError for an exception of botocore or aiohttp; `subject` is what the request
    was about."""
    subject = printable(subject, "?")
    if isinstance(error, boto.ClientError):
        return _from_answer(error, subject)
    if isinstance(error, _NO_CREDENTIALS):
        return AccessRefused(f"no usable S3 credentials were found ({error}): {LOGIN_ADVICE}")
    if isinstance(error, _WRONG_SETTINGS):
        return WrongSettings(f"the S3 settings can't be used: {error}")
    if isinstance(error, boto.ParamValidationError):
        text = " ".join(str(error).split())
        wrong = "invalid bucket name" in text.lower()
        return (WrongSettings if wrong else InvalidRequest)(f"{subject}: S3 can't be asked: {text}")
    if isinstance(error, ResponseParserError | ValueError):
        return ProtocolError(f"{subject}: the answer of the S3 server can't be understood")
    if isinstance(error, RecursionError):
        return ProtocolError(f"{subject}: the answer of the S3 server is nested too deep")
    if isinstance(inner := _inner(error), UnfitResponse):
        return ProtocolError(f"{subject}: {inner}")
    if isinstance(error, _TIMEOUTS):
        return TimedOut(f"the S3 endpoint{_endpoint(error)} did not answer in time")
    if isinstance(error, _UNREACHABLE):
        kind = NotConnected if is_of_connecting(error) else Unreachable
        return kind(f"the S3 endpoint{_endpoint(error)} can't be reached ({_cause(error)})")
    return RemoteFailure(f"{subject}: the S3 request failed: {error}")


def is_of_connecting(error: Exception) -> bool:
    """Whether nothing was sent: there was no connection to send it over. botocore wraps those that
    broke in the same exception, and the one inside tells; a proxy was asked for a way only."""
    if isinstance(error, boto.ProxyConnectionError | boto.ConnectTimeoutError):
        return True
    inner = _inner(error)
    return isinstance(inner if isinstance(inner, Exception) else error, _NOT_CONNECTED)


def _inner(error: Exception) -> object:
    """Return the exception that botocore has wrapped."""
    return getattr(error, "kwargs", {}).get("error")


def _endpoint(error: Exception) -> str:
    """Return the endpoint, where the error tells: without the path and query, which are the
    request's."""
    url = getattr(error, "kwargs", {}).get("endpoint_url")
    parts = urlsplit(str(url)) if url else None
    return f" {parts.scheme}://{parts.netloc}" if parts and parts.netloc else ""


def _cause(error: Exception) -> str:
    """Return what the operating system said, else the library's words."""
    inner = _inner(error) or error
    system = getattr(inner, "os_error", inner)
    reason = getattr(system, "strerror", None) or str(inner) or type(inner).__name__
    return " ".join(str(reason).split())


def _from_answer(error: boto.ClientError, subject: str) -> RemoteError:
    answer = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    status = str(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
    elsewhere = _redirected(answer)
    if elsewhere is not None:
        return RemoteFailure(
            f"the S3 endpoint redirects to {elsewhere}, which is not asked: if that is where the "
            "bucket is, set `endpoint_url` to it and mount again"
        )
    # A conflict of another kind (409) than that of a condition is none of versions.
    for name in (code,) if status == "409" and code else (code, status):
        known = _CODES.get(_SAME.get(name, name))
        if known is not None:
            cls, text = known
            of_the_site = cls.lasting or issubclass(cls, Unreachable)
            return cls(text if of_the_site else f"{subject}: {text}")
    text = str(answer.get("Error", {}).get("Message", "")) or "no reason given"
    if "unsupported character" in text:  # rclone's and MinIO's servers, for "a//b" or "..".
        return InvalidName(f"{subject}: the server can't hold this name: choose another")
    if "quota" in code.lower():
        return NoSpace(f"{subject}: {_CODES['QuotaExceeded'][1]}")
    return RemoteFailure(f"{subject}: the S3 server reported {code or status} ({text})")


def _redirected(answer: Mapping[str, Any]) -> str | None:
    """Return where an answer points; None where it is none of the web's redirects. S3's own name
    the bucket's region, and botocore has followed them as far as they can be."""
    about = answer.get("ResponseMetadata", {})
    headers = about.get("HTTPHeaders", {})
    if about.get("HTTPStatusCode") not in _REDIRECTS or "x-amz-bucket-region" in headers:
        return None
    if "location" not in headers or answer.get("Error", {}).get("Code") == "PermanentRedirect":
        return None
    try:
        parts = urlsplit(str(headers["location"]))
        place = f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")
    except ValueError:
        return "an address that is none"
    if not parts.hostname:
        return "another path"
    return printable(place[:300], "?")


def not_public(bucket: str) -> str:
    """Why a bucket that was asked without credentials refuses."""
    return f"no usable S3 credentials were found, and {bucket} is not public: {LOGIN_ADVICE}"


def is_refusal(error: RemoteError) -> bool:
    """Whether the server does not want the request as it was made: without credentials, the codes
    are many."""
    answer = getattr(error.__cause__, "response", {})
    return answer.get("ResponseMetadata", {}).get("HTTPStatusCode") in (400, 401, 403)


def is_fault(error: RemoteError) -> bool:
    """Whether the server failed (500 and the like), other than to say that it can't do that."""
    answer = getattr(error.__cause__, "response", {})
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return status >= 500 and status != 501


def is_answer(error: RemoteError) -> bool:
    """Whether the server refused in words of its own; otherwise what came made no sense."""
    return isinstance(error.__cause__, boto.ClientError)


def is_passing_fault(error: boto.ClientError) -> bool:
    """Whether the server failed in a way that the next attempt may not meet, as Amazon's SDKs see
    it (docs.aws.amazon.com/sdkref/latest/guide/feature-retry-behavior.html)."""
    if str(error.response.get("Error", {}).get("Code", "")) in _PASSING:
        return True
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status in (500, 502, 504)


def is_rate_limit(error: boto.ClientError) -> bool:
    """Whether a throttling answer says that the server is there, and asked too often: other than a
    503 that may come from whatever stands before a server that is down."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status == 429 or _SAME.get(code, code) == "SlowDown"


def is_throttling(error: boto.ClientError) -> bool:
    """Whether the same request is to be made again, later. A 503 without a word is one, too: an
    answer to HEAD has no words."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    if code and not code.isdigit():
        return _SAME.get(code, code) in ("SlowDown", "ServiceUnavailable")
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in (429, 503)


def is_expiry(error: boto.ClientError) -> bool:
    """Whether other credentials may help, as these have expired."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return _SAME.get(code, code) in ("ExpiredToken", "InvalidToken")


def may_be_expiry(error: boto.ClientError) -> bool:
    """Whether `is_expiry` holds, as far as the answer tells. One to HEAD does not say why: S3's is
    a plain 400, as it is for much else."""
    return is_expiry(error) or str(error.response.get("Error", {}).get("Code", "")) == "400"


def is_worded(error: RemoteError) -> bool:
    """Whether the server refused with a code of its own, so that it is S3 that answers: an answer
    to HEAD has none, nor has that of something before the server."""
    answer = getattr(error.__cause__, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", ""))
    return bool(code) and not code.isdigit()


def s3_code(error: RemoteError) -> str:
    """Return the server's code of a failure that `translate` made of its answer."""
    answer = getattr(error.__cause__, "response", None) or {}  # None: there was no answer
    code = str(answer.get("Error", {}).get("Code", ""))
    return _SAME.get(code, code)


@contextmanager
def translating(subject: str) -> Iterator[None]:
    """Turn their exceptions into RemoteErrors while a body is read: one that breaks off says
    nothing of the site."""
    try:
        yield
    except CAUGHT as error:
        raise translate(error, subject) from error


@contextmanager
def unparsable_refused() -> Iterator[None]:
    """Raise ValueError for whatever an answer makes botocore's parsers fail with: they take it to
    have the form that it should."""
    try:
        yield
    except (*CAUGHT, RemoteError):
        raise
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
