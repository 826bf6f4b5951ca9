"""Regular expressions from files, matched without backtracking: time grows with the lengths, whatever the pattern.

Adapters name matrices by patterns such as `layers\\.[0-3]\\.attn\\.(qkv|out)_proj`. Literals, `.`, classes, groups,
alternatives, repeats and anchors are supported; look-around, back-references and flags are not.
"""

import re
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import NamedTuple

from ...errors import AdapterError, quoted

_LONGEST_PATTERN = 1000
_DEEPEST = 20  # groups within groups
_MOST_REPEATS = 1000
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\\[])*\]", re.DOTALL)
_REPEAT = re.compile(r"([*+?]|\{(\d*)(,?)(\d*)\})\??")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")


class _Node(NamedTuple):
    """Part of a pattern."""

    kind: str  # character, start, end, sequence, either, repeat
    parts: tuple["_Node", ...] = ()
    test: Callable[[str], bool] = bool  # of a character
    least: int = 0
    most: int = 0


class Pattern:
    """A compiled pattern.

    Raises:
        AdapterError: if it is not a regular expression, or an unsupported one.
    """

    def __init__(self, source: str):
        self.source = source
        self._at = 0
        if len(source) > _LONGEST_PATTERN:
            raise self._error("too long")
        self._node = self._either(0)
        if self._at < len(source):
            raise self._error("unbalanced parenthesis")

    def matches(self, text: str) -> bool:
        """Whether the pattern matches the beginning of a text, as `re.match`."""
        return _ends(self._node, 1, _Text(text)) > 0

    def matches_path(self, path: str) -> bool:
        """Whether the pattern matches a whole dotted path, or one of its endings that follow a dot."""
        text = _Text(path)
        return _ends(self._node, 1 | text.positions.get(".", 0) << 1, text) & text.end > 0

    def _error(self, problem: str) -> AdapterError:
        return AdapterError(f"unsupported regular expression {quoted(self.source)}: {problem}")

    def _either(self, depth: int) -> _Node:
        if depth > _DEEPEST:
            raise self._error("nested too deeply")
        branches = [self._sequence(depth)]
        while self.source[self._at : self._at + 1] == "|":
            self._at += 1
            branches.append(self._sequence(depth))
        return branches[0] if len(branches) == 1 else _Node("either", tuple(branches))

    def _sequence(self, depth: int) -> _Node:
        parts = []
        while self._at < len(self.source) and self.source[self._at] not in "|)":
            part = self._part(depth)
            found = _REPEAT.match(self.source, self._at)
            if found and found[0] != "{,}":
                self._at = found.end()
                part = _Node("repeat", (part,), bool, *self._times(found))
                if _REPEAT.match(self.source, self._at) or self.source[self._at : self._at + 1] == "+":
                    raise self._error("multiple repeat")
            parts.append(part)
        return _Node("sequence", tuple(parts))

    def _times(self, found: re.Match[str]) -> tuple[int, int]:
        if found[1] in "*+?":
            return int(found[1] == "+"), 1 if found[1] == "?" else _MOST_REPEATS
        least = int(found[2][:5] or 0)
        most = int(found[4][:5]) if found[4] else _MOST_REPEATS if found[3] else least
        if not least <= most <= _MOST_REPEATS:
            raise self._error("a repeat is out of range")
        return least, most

    def _part(self, depth: int) -> _Node:
        character = self.source[self._at]
        if character == "(":
            found = _GROUP.match(self.source, self._at)
            if not found:
                raise self._error("only plain groups are supported")
            self._at = found.end()
            inner = self._either(depth + 1)
            if self.source[self._at : self._at + 1] != ")":
                raise self._error("missing )")
            self._at += 1
            return inner
        if character in "*+?" or (character == "{" and _REPEAT.match(self.source, self._at)):
            raise self._error("nothing to repeat")
        if character in "^$":
            self._at += 1
            return _Node("start" if character == "^" else "end")
        return self._character(character)

    def _character(self, character: str) -> _Node:
        """A node for one character: a literal, `.`, an escape, or a class."""
        found = _CLASS.match(self.source, self._at) if character == "[" else None
        width = len(found[0]) if found else 2 if character == "\\" else 1
        source = self.source[self._at : self._at + width]
        if character == "[" and not found:
            raise self._error("unsupported class")
        if character == "\\" and not re.fullmatch(r"\\([^\w\s]|[dDwWsS_])", source):
            raise self._error("unsupported escape")
        self._at += width
        if character not in ".[\\":
            return _Node("character", test=lambda other: other == character)
        try:
            one = re.compile(source)  # one character, so there is nothing to backtrack
        except re.error as error:
            raise self._error(str(error)) from error
        return _Node("character", test=lambda other: one.match(other) is not None)


class _Text:
    """A text to match: the positions of each of its characters. A set of positions is an integer, one bit for each."""

    def __init__(self, text: str):
        self.end = 1 << len(text)
        self.positions: dict[str, int] = {}
        for place, character in enumerate(text):
            self.positions[character] = self.positions.get(character, 0) | 1 << place


def _ends(node: _Node, starts: int, text: _Text) -> int:
    """Positions at which a match of a node from any of some positions can end."""
    if node.kind == "start":
        return starts & 1
    if node.kind == "end":
        return starts & text.end
    if node.kind == "character":
        fitting = (places for character, places in text.positions.items() if node.test(character))
        return (starts & sum(fitting)) << 1
    if node.kind == "either":
        return reduce(or_, (_ends(part, starts, text) for part in node.parts))
    if node.kind == "sequence":
        for part in node.parts:
            starts = starts and _ends(part, starts, text)
        return starts
    return _repeated(node, starts, text)


def _repeated(node: _Node, starts: int, text: _Text) -> int:
    reached = 0
    for _ in range(node.least):
        after = _ends(node.parts[0], starts, text)
        if after == starts:
            break  # every further repeat gives the same
        starts = after
    for _ in range(node.most - node.least + 1):
        starts &= ~reached  # others have been continued already
        if not starts:
            break
        reached |= starts
        starts = _ends(node.parts[0], starts, text)
    return reached
