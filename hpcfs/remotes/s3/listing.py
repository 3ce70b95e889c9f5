"""Collates S3's listing to a directory's names: pure, and in bounded memory.

With a delimiter, S3 returns objects ("a", "a-b") and common prefixes ("a/") in byte order. An
object beside a prefix of the same name needs another name than one without, but in byte order
other names come between the two ("a", "a!x", "a-b", "a/"), perhaps on other pages. So an object is
held back as long as what follows still begins with its name; the held ones form a stack in which
each begins with the one below, so it never holds more than one name's length of them.

A server that does not sort is survived: such an object is then shown without BESIDE, beside the
directory, and the mount takes the directory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hpcfs.remotes.s3.names import MARKER

T = TypeVar("T")


@dataclass(frozen=True)
class Listed(Generic[T]):
    """One entry: a directory has no `item`."""

    component: str
    item: T | None
    beside: bool = False


@dataclass
class Collator(Generic[T]):
    """Fed with the names of one directory, relative to it, in byte order; prefixes end in "/"."""

    _held: list[tuple[str, T]] = field(default_factory=list)
    _last_prefix: str | None = None

    def object(self, name: str, item: T) -> Iterator[Listed[T]]:
        """Take an object; yields the entries that are complete now."""
        yield from self._settled(name)
        self._held.append((name, item))

    def prefix(self, name: str) -> Iterator[Listed[T]]:
        """Take a common prefix; yields the entries that are complete now."""
        if name == self._last_prefix:
            return
        self._last_prefix = name
        component = name[:-1]
        yield from self._settled(name)
        if self._held and self._held[-1][0] == component:
            yield Listed(component, self._held.pop()[1], beside=True)
        yield Listed(component, None)

    def end(self) -> Iterator[Listed[T]]:
        """Yield the entries that are left."""
        while self._held:
            yield Listed(*self._held.pop())

    def _settled(self, name: str) -> Iterator[Listed[T]]:
        """Yield those held back that can't be beside a prefix any more, now that `name` has
        come."""
        while self._held and not name.startswith(self._held[-1][0]):
            yield Listed(*self._held.pop())


def in_order(
    objects: Iterable[tuple[str, T]], prefixes: Iterable[str]
) -> Iterator[tuple[str, T | None]]:
    """Merge one page's two lists; markers, which are not shown, should be gone already."""
    both: list[tuple[str, T | None]] = [*objects, *((name, None) for name in prefixes)]
    return iter(sorted(both, key=lambda pair: pair[0]))


def is_marker(name: str, size: int) -> bool:
    """Whether this object, by its name in the directory, only says that the directory is there.

    With content it is somebody's data, and is shown.
    """
    return size == 0 and name in ("", MARKER)
