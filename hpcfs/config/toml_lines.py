"""Finds the line of every key in a TOML text, which tomllib does not report.

It takes only texts that tomllib has accepted, and checks nothing. A key's path is a tuple of table
names, key names and, in arrays, indices: the way to its value in the parsed document.
"""

from __future__ import annotations

import re
import tomllib

KeyPath = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_PLAIN_VALUE = re.compile(r"[^,\]}#\r\n]+")
_STRINGS = (
    re.compile(r'"""(?:\\.|[^\\])*?"{3,5}', re.DOTALL),
    re.compile(r"'''.*?'{3,5}", re.DOTALL),
    re.compile(r'"(?:\\.|[^"\\])*"'),
    re.compile(r"'[^']*'"),
)


def find_lines(text: str) -> dict[KeyPath, int]:
    """Return the line number, from 1, where each table, key and array element is first named."""
    scanner = _Scanner(text)
    scanner.scan_document()
    return scanner.lines


class _Scanner:
    """Scans the text once; `position` is the index of the next character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[KeyPath, int] = {}
        self._array_tables: dict[KeyPath, int] = {}
        """The index of the last element of each array of tables."""

    def scan_document(self) -> None:
        """Scan the whole text, and fill `lines`."""
        table: KeyPath = ()
        self._skip_blank()
        while self.position < len(self.text):
            if self._take("[["):
                table = self._scan_header(is_array=True)
            elif self._take("["):
                table = self._scan_header(is_array=False)
            else:
                self._scan_pair(table)
            self._skip_blank()

    def _scan_header(self, *, is_array: bool) -> KeyPath:
        start = self.position
        path: KeyPath = ()
        keys = self._scan_key()
        for number, key in enumerate(keys):
            path = (*path, key)
            self._note(path, start)
            if is_array and number == len(keys) - 1:
                self._array_tables[path] = self._array_tables.get(path, -1) + 1
            if path in self._array_tables:
                path = (*path, self._array_tables[path])
                self._note(path, start)
        self._skip_blank()
        self._take("]]" if is_array else "]")
        return path

    def _scan_pair(self, table: KeyPath) -> None:
        start = self.position
        path = table
        for key in self._scan_key():
            path = (*path, key)
            self._note(path, start)
        self._skip_blank()
        self._take("=")
        self._skip_blank()
        self._scan_value(path)

    def _scan_key(self) -> list[str]:
        keys = [self._scan_key_part()]
        self._skip_blank()
        while self._take("."):
            keys.append(self._scan_key_part())
            self._skip_blank()
        return keys

    def _scan_key_part(self) -> str:
        self._skip_blank()
        if bare := _BARE_KEY.match(self.text, self.position):
            self.position = bare.end()
            return bare[0]
        start = self.position
        self._skip_string()
        return str(tomllib.loads(f"key = {self.text[start : self.position]}")["key"])

    def _scan_value(self, path: KeyPath) -> None:
        if self._take("["):
            self._scan_array(path)
        elif self._take("{"):
            self._scan_inline_table(path)
        elif not self._skip_string() and (plain := _PLAIN_VALUE.match(self.text, self.position)):
            self.position = plain.end()

    def _scan_array(self, path: KeyPath) -> None:
        index = 0
        self._skip_blank()
        while not self._take("]"):
            self._note((*path, index), self.position)
            self._scan_value((*path, index))
            index += 1
            self._skip_separator()

    def _scan_inline_table(self, path: KeyPath) -> None:
        self._skip_blank()
        while not self._take("}"):
            self._scan_pair(path)
            self._skip_separator()

    def _skip_separator(self) -> None:
        self._skip_blank()
        self._take(",")
        self._skip_blank()

    def _skip_string(self) -> bool:
        for kind in _STRINGS:
            if found := kind.match(self.text, self.position):
                self.position = found.end()
                return True
        return False

    def _skip_blank(self) -> None:
        found = _BLANK.match(self.text, self.position)
        assert found is not None  # it matches the empty string, too
        self.position = found.end()

    def _take(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.position):
            return False
        self.position += len(mark)
        return True

    def _note(self, path: KeyPath, position: int) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, position) + 1)
