"""Capabilities of an S3 implementation, probed at run time: none of them says what it can."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ServerCapabilities:
    """The capabilities of one site's server; None for those that are not known yet."""

    matches: bool | None = None
    """Writes with If-Match are refused where another version is there,"""
    none_matches: bool | None = None
    """and those with If-None-Match where anything is."""
    being_tried: bool = False
    """Somebody is finding out one of these two."""
    copies_parts: bool | None = None
    copies_markers: bool | None = None
    """An object "a/" can be copied."""
    deletes_many: bool | None = None
    answers_crcs: bool | None = None
    """A CRC-32 that goes with a body is compared, and answered."""
    md5_etags: bool | None = None
    """The ETag of an object sent in one piece, and not encrypted, is the MD5 of its content."""
    joins_md5s: bool | None = None
    """The ETag of an object sent in parts is made of theirs."""

    def honours(self, base: bytes) -> bool | None:
        """Return whether the server honours the condition that stands for this version (see
        UploadRequest); None where that is not known."""
        if b":" in base:  # no ETag: nothing to send
            return False
        return self.matches if base else self.none_matches

    def note(self, base: bytes, *, honours: bool) -> None:
        """Note whether the server honours the condition that stands for this version."""
        if base:
            self.matches = honours
        else:
            self.none_matches = honours
