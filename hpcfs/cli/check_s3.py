"""Checks an S3 namespace: credentials, the endpoint, the bucket. Sends one request."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from hpcfs.cli.findings import Finding
from hpcfs.model.sites import S3Root, S3Site

_ADVICE = {
    "NoSuchBucket": "there is no such bucket: correct bucket or endpoint_url",
    "AccessDenied": "access is denied: ask the bucket's owner for s3:ListBucket",
    "InvalidAccessKeyId": "the endpoint doesn't know this access key: correct the credentials",
    "SignatureDoesNotMatch": "the secret key is wrong: correct the credentials",
    "ExpiredToken": "the credentials have expired: log in again, as with 'aws sso login'",
    "PermanentRedirect": "the bucket is in another region: set region",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set region",
}
_SET_THEM = (
    "set credentials with 'aws configure', 'aws sso login' or AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY"
)


def s3_namespace(subject: str, site: S3Site, root: S3Root) -> Iterator[Finding]:
    """Check the namespace."""
    from botocore import exceptions
    from botocore.session import Session

    try:
        session = Session(profile=site.profile)
        source = _credentials(session, site)
    except exceptions.BotoCoreError as error:
        yield Finding("fail", subject, f"{error}: correct profile or ~/.aws")
        return
    if source is None and site.profile is not None:
        yield Finding("fail", subject, f"{site.profile} has no S3 credentials: {_SET_THEM}")
        return
    if source is None:
        yield Finding("ok", subject, "no credentials: the bucket is asked as anybody may")
    else:
        yield Finding("ok", subject, f"credentials from {source}")
    yield _list(subject, session, site, root, signs=source is not None)


def _credentials(session: Any, site: S3Site) -> str | None:
    """Set up credentials, and return where they come from; None if there are none."""
    if site.anonymous:
        return None
    if site.access_key and site.secret_key:
        session.set_credentials(site.access_key.value, site.secret_key.value)
        return "rclone.conf"
    found = session.get_credentials()
    return str(found.method) if found else None


def _list(subject: str, session: Any, site: S3Site, root: S3Root, *, signs: bool) -> Finding:
    from botocore import exceptions

    where = site.endpoint_url or "AWS"
    try:
        client = _client(session, site, signs=signs)
        client.list_objects_v2(Bucket=root.bucket, Prefix=root.prefix, MaxKeys=1)
    except exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        advice = _ADVICE.get(code, f"it answers {code or error}")
        if not signs:
            advice = f"it is not public ({code or error}): {_SET_THEM}"
        return Finding("fail", subject, f"bucket {root.bucket} at {where}: {advice}")
    except exceptions.SSLError as error:
        return Finding("fail", subject, f"{where}: its certificate is not trusted: {error}")
    except (exceptions.HTTPClientError, exceptions.ConnectionError):
        return Finding("fail", subject, f"{where} can't be reached: is endpoint_url right?")
    except (exceptions.BotoCoreError, ValueError) as error:
        return Finding("fail", subject, f"bucket {root.bucket} at {where}: {error}")
    return Finding("ok", subject, f"bucket {root.bucket} at {where} can be listed")


def _client(session: Any, site: S3Site, *, signs: bool) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.handlers import validate_bucket_name

    options = Config(
        connect_timeout=site.connect_timeout,
        read_timeout=site.connect_timeout,
        retries={"total_max_attempts": 1},
        s3={"addressing_style": "path"} if site.endpoint_url else None,  # as the mount does
        signature_version=None if signs else UNSIGNED,
    )
    region = site.region or session.get_config_variable("region") or "us-east-1"
    bundle = os.environ.get("AWS_CA_BUNDLE")
    client = session.create_client(
        "s3", region_name=region, endpoint_url=site.endpoint_url, config=options, verify=bundle
    )
    client.meta.events.unregister("before-parameter-build.s3", validate_bucket_name)
    return client
