"""Sorts the arguments of `hpcfs mount`: a mount point, and remotes with or without a name.

They may come in any order, so that sshfs's habit (remote first) and mount's both work. A colon
before any slash makes an argument a remote, as for scp; `./odd:name` is a directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import click

from hpcfs.config import urls, values

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Arguments:
    """The mount point, if one was given, and the remotes as (name or None, URL)."""

    mountpoint: str | None
    named_urls: list[tuple[str | None, str]]


def recognise(arguments: Sequence[str]) -> Arguments:
    """Sort the arguments. Raises click.UsageError where they don't fit together."""
    named_urls: list[tuple[str | None, str]] = []
    directories: list[str] = []
    for argument in arguments:
        name, is_named, url = argument.partition("=")
        if is_named and ":" not in name and not os.path.isdir(argument) and _is_url(url, name):
            named_urls.append((_checked_name(name), url))
        elif urls.looks_like_url(argument):
            named_urls.append((None, argument))
        else:
            directories.append(argument)
    if len(directories) > 1:
        raise click.UsageError(
            f"there is one mount point, not {len(directories)}: {', '.join(directories)}; "
            "a remote is named by host:path, sftp://host/path or s3://bucket"
        )
    unnamed = [url for name, url in named_urls if name is None]
    if unnamed and len(named_urls) > 1:
        raise click.UsageError("with several remotes each needs a name: NAME=URL NAME=URL")
    return Arguments(directories[0] if directories else None, named_urls)


def _is_url(url: str, name: str) -> bool:
    """Return whether NAME=URL is meant. It is for `data=login3`, though its URL is wrong; `~/a=b`
    is a directory."""
    return urls.looks_like_url(url) or urls.is_valid_name(name)


def _checked_name(name: str) -> str:
    if not urls.is_valid_name(name):
        raise click.UsageError(
            f"{name!r} can't name a remote: use letters, digits, '.', '_' and '-'"
        )
    return name


def read_by(
    reader: Callable[[object], T],
) -> Callable[[click.Context, click.Parameter, str | None], T | None]:
    """Return a click callback that reads an option's value with a reader of config/values.py."""

    def read(ctx: click.Context, parameter: click.Parameter, value: str | None) -> T | None:
        try:
            return None if value is None else reader(value)
        except values.BadValue as error:
            raise click.BadParameter(f"it {error}") from None

    return read
