"""Tags (lifecycle and retention rules go by them) and access lists of objects, which writing an
object anew would lose.

A HEAD tells how many tags there are, so an object without any costs nothing. Of an access list it
tells nothing: it is asked for once before each writing, where the bucket has such lists at all.
Most have none (AWS since 2023, unless they are switched on; servers that don't know them), which
is found out once. The log tells what can't be kept.
docs.aws.amazon.com/AmazonS3/latest/userguide/acl-overview.html, .../object-tagging.html
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlencode

from hpcfs.model.errors import NotFound, PermissionDenied, RemoteError, Unreachable
from hpcfs.remotes.s3.bucket import Bucket
from hpcfs.remotes.s3.caches import ExpiringCache
from hpcfs.remotes.s3.objects import PRIVATE, Info
from hpcfs.remotes.s3.translate import is_answer, is_fault

log = logging.getLogger(__name__)
SEEN_SECONDS = 1.0
SEEN = 10_000
_GROUPS = "http://acs.amazonaws.com/groups/global/"
_CANNED = {
    frozenset({("AllUsers", "READ")}): "public-read",
    frozenset({("AllUsers", "READ"), ("AllUsers", "WRITE")}): "public-read-write",
    frozenset({("AuthenticatedUsers", "READ")}): "authenticated-read",
}
_GRANTS = {
    "FULL_CONTROL": "GrantFullControl",
    "READ": "GrantRead",
    "READ_ACP": "GrantReadACP",
    "WRITE_ACP": "GrantWriteACP",
}
_NAMES = {"CanonicalUser": ("id", "ID"), "Group": ("uri", "URI")}


class TagsAndAcls:
    """Finds the tags and access lists of objects in one bucket."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._has_lists: bool | None = None
        self._lock = asyncio.Lock()
        self._seen: ExpiringCache[dict[str, Any]] = ExpiringCache(SEEN_SECONDS, SEEN)
        """A program that writes a file changes it several times in a row."""

    async def of(self, found: Info) -> dict[str, Any]:
        """The headers with which the object keeps what it has."""
        tags, access = await asyncio.gather(self._tags(found), self._access(found))
        return {**found.headers, **tags, **access}

    async def access(self, key: str) -> dict[str, Any]:
        """The part of them that a copy on the server does not keep by itself. `key` is there."""
        if not await self._may_have_lists():
            return {}
        known = self._seen.get(key)
        if known is not None:
            return known
        try:
            answer = await self._bucket.call("get_object_acl", key, Key=key)
        except NotFound:
            return {}
        except Unreachable:
            raise
        except RemoteError as error:
            if is_fault(error) or not is_answer(error):  # of the moment: others may be answered
                log.warning("%s loses its access list, if it has one: %s", key, error.message)
            else:
                self._has_lists = False
                log.info("access lists are not kept: %s", error.message)
            return {}
        found = parameters_of(answer)
        self._seen.put(key, found)
        return found

    def has(self, key: str, access: dict[str, Any]) -> None:
        """The object was written here."""
        self._seen.put(key, access or {"ACL": PRIVATE})

    async def tags(self, found: Info) -> dict[str, Any]:
        """Return the tags of an object that another one replaces under its name, as headers."""
        if "Tagging" in found.headers:
            return {"Tagging": found.headers["Tagging"]}
        return await self._tags(found)

    async def _tags(self, found: Info) -> dict[str, Any]:
        if not found.tag_count or "Tagging" in found.headers:
            return {}
        key = found.key
        try:
            answer = await self._bucket.call("get_object_tagging", key, Key=key)
        except Unreachable:
            raise
        except RemoteError as error:
            log.warning("%s loses its tags, which can't be read: %s", key, error.message)
            return {}
        tags = answer.get("TagSet", [])
        pairs = [(str(tag.get("Key", "")), str(tag.get("Value", ""))) for tag in tags]
        return {"Tagging": urlencode(pairs, quote_via=quote)} if pairs else {}

    async def _access(self, found: Info) -> dict[str, Any]:
        if "ACL" in found.headers or any(name in found.headers for name in _GRANTS.values()):
            return {}
        return await self.access(found.key)

    async def _may_have_lists(self) -> bool:
        """Found out once, of the bucket: servers that know no access lists may send a whole object
        when they are asked for its list."""
        async with self._lock:
            if self._has_lists is None:
                self._has_lists = await self._has_bucket_lists()
        return bool(self._has_lists)

    async def _has_bucket_lists(self) -> bool | None:
        """Whether its objects have access lists; None where an answer made no sense."""
        about = f"bucket {self._bucket.name}"
        with suppress(RemoteError):  # where nothing is set, or it is not known: the next tells
            answer = await self._bucket.call("get_bucket_ownership_controls", about)
            rules = answer.get("OwnershipControls", {}).get("Rules", [])
            if any(rule.get("ObjectOwnership") == "BucketOwnerEnforced" for rule in rules):
                return False
        try:
            return bool((await self._bucket.call("get_bucket_acl", about)).get("Grants"))
        except Unreachable:
            raise
        except RemoteError as error:
            return isinstance(error, PermissionDenied) if is_answer(error) else None


def parameters_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that give another object the access list that GetObjectAcl told. One
    that only the owner has access by is not sent: it is what each object has."""
    owner = str(answer.get("Owner", {}).get("ID", ""))
    grants: list[tuple[str, str, str]] = []
    for grant in answer.get("Grants", []):
        grantee = grant.get("Grantee", {})
        form, field = _NAMES.get(str(grantee.get("Type", "")), ("", ""))
        name = str(grantee.get(field, "")) if form else ""
        if name and (form, name) != ("id", owner):
            grants.append((form, name, str(grant.get("Permission", ""))))
    if not grants:
        return {"ACL": PRIVATE}
    canned = _CANNED.get(frozenset((name.removeprefix(_GROUPS), may) for _, name, may in grants))
    if canned is not None:
        return {"ACL": canned}
    found: dict[str, list[str]] = {"GrantFullControl": [f'id="{owner}"']} if owner else {}
    for form, name, may in grants:
        if may in _GRANTS and name.isprintable() and '"' not in name:
            found.setdefault(_GRANTS[may], []).append(f'{form}="{name}"')
    return {parameter: ", ".join(names) for parameter, names in found.items()}
