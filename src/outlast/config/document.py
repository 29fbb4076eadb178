"""From the bytes of a file to the nodes of its YAML, each with its line. Nothing in it is ever constructed.

Raises `Unreadable` with the one mistake after which nothing more can be told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

FILE_BYTES_MAX = 1 << 20
DEPTH_MAX = 20
NODES_MAX = 50_000
"""also after anchors were followed, so that a short file can't stand for a long one"""


class Mistake(NamedTuple):
    """What is wrong at a place of the file, and what to write instead. Lines and columns count from 1."""

    line: int
    column: int
    where: str
    """the keys that lead there, joined by dots; "" for the file as a whole"""
    problem: str
    hint: str = ""

    def text(self, path: str) -> str:
        """As one line: FILE:LINE: WHERE: PROBLEM; HINT"""
        said = ": ".join(part for part in (self.where, self.problem) if part)
        return f"{path}:{self.line}: {said}{'; ' if self.hint else ''}{self.hint}"


class Unreadable(Exception):
    """The file is no YAML that could be looked into."""

    def __init__(self, mistake: Mistake) -> None:
        super().__init__(mistake.problem)
        self.mistake = mistake


def root(data: bytes) -> Node:
    """The outermost node. Raises `Unreadable`."""
    if len(data) > FILE_BYTES_MAX:
        raise Unreadable(Mistake(1, 1, "", "is larger than 1 MiB", "is it the right file?"))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        before = data[: exc.start]
        line, column = before.count(b"\n") + 1, exc.start - (before.rfind(b"\n") + 1) + 1
        raise Unreadable(Mistake(line, column, "", "is not UTF-8", "save it as UTF-8")) from exc
    loader = None
    try:
        loader = _Loader(text)
        found = loader.get_single_node()
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise Unreadable(Mistake(line, 1, "", f"holds the character U+{exc.character:04X}", _SPACES)) from exc
    except yaml.MarkedYAMLError as exc:
        raise Unreadable(_told(exc)) from exc
    except (ValueError, OverflowError) as exc:  # numbers in escapes and directives that the parser doesn't bound
        line = loader.line + 1 if loader else 1
        raise Unreadable(Mistake(line, 1, "", "is no YAML: a number is out of range")) from exc
    if found is None:
        raise Unreadable(Mistake(1, 1, "", "is empty", "begin with `storage_tiers:`"))
    return found


class _Loader(yaml.SafeLoader):
    """Refuses what is nested or long beyond reason, before it costs memory or stack."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._depth, self._count = self._depth + 1, self._count + 1
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self._depth > DEPTH_MAX:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {DEPTH_MAX} deep", problem_mark=mark)
        if self._count > NODES_MAX:
            raise yaml.MarkedYAMLError(problem=f"it has more than {NODES_MAX:,} values", problem_mark=mark)
        found: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return found


_SPACES = "indent with spaces and save it as plain text"


def _told(exc: yaml.MarkedYAMLError) -> Mistake:
    problem = re.sub(r"\s+", " ", exc.problem or "")
    is_open = "could not find expected ':'" in problem or "unexpected end of stream" in problem
    mark = exc.context_mark if is_open and exc.context_mark else exc.problem_mark or exc.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    if "'\\t'" in problem:
        return Mistake(line, column, "", "is indented with a tab", "YAML takes spaces alone")
    hint = "is a `:` missing, or a quote or bracket not closed?" if is_open else ""
    if "but got '{'" in problem or "but got '}'" in problem:
        hint = "is a `${NAME}` there that is not in quotes? inside [] and {} it has to be"
    elif "mapping values are not allowed" in problem:
        hint = "is the line above indented as it should be, and is what holds `: ` in quotes?"
    elif "found another document" in problem:
        return Mistake(line, column, "", "has more than one document", "leave out `---` and what follows")
    elif re.search("'[%@`]'|alias|anchor|tag", problem):
        hint = "put texts that begin with *, &, !, %, @ or ` in quotes"
    return Mistake(line, column, "", f"is no YAML: {problem}", hint)


class Pair(NamedTuple):
    """A key of a mapping with its value."""

    key: ScalarNode
    value: Node
    is_merged: bool
    """it came by `<<`, and a key that stands here goes before it"""


class Pairs:
    """Reads mappings, follows `<<`, and keeps count: what anchors unfold to is bounded too."""

    def __init__(self) -> None:
        self._left = NODES_MAX

    def of(self, node: MappingNode, open_nodes: tuple[int, ...] = ()) -> Iterator[Pair | Mistake]:
        """Its pairs, those of `<<` last; a `Mistake` for each that is none."""
        merged: list[Node] = []
        for key, value in node.value:
            self._left -= 1
            if self._left < 0:
                raise Unreadable(mistake_at(node, "", "its anchors unfold to too much"))
            if not isinstance(key, ScalarNode):
                yield mistake_at(key, "", "a key is a word, and this is none")
            elif key.tag == "tag:yaml.org,2002:merge":
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                yield Pair(key, value, False)
        for each in merged:
            if not isinstance(each, MappingNode) or id(each) in open_nodes or each is node:
                yield mistake_at(each, "", "`<<` takes an alias of keys and values")
                continue
            for found in self.of(each, (*open_nodes, id(node))):
                yield found._replace(is_merged=True) if isinstance(found, Pair) else found


def mistake_at(node: Node, where: str, problem: str, hint: str = "") -> Mistake:
    return Mistake(node.start_mark.line + 1, node.start_mark.column + 1, where, problem, hint)
