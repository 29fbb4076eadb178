"""From nodes to the values of known keys. Every mistake is noted, and reading goes on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from outlast.config.document import Mistake, Pair, Pairs, mistake_at
from outlast.config.fields import POLICIES, TOP, Field, Section, homes
from outlast.config.values import Kind, Misfit, Place, nearest, shown

OFF = "off"
ITEMS_MAX = 1000
_FALSE, _TRUE = ("off", "false", "no"), ("on", "true", "yes")
_NAME = re.compile(r"[^\W_][\w-]{0,63}")
_TAGS = {
    f"tag:yaml.org,2002:{each}"
    for each in ("str", "int", "float", "bool", "null", "timestamp", "value", "merge", "map", "seq")
}

Values = dict[str, Any]
"""key -> its value; a section is `Values` again, or OFF"""


class Reader:
    """What was found: `mistakes`, the `lines` of everything that stands there, and where something is `bad`."""

    def __init__(self, place: Place) -> None:
        self.mistakes: list[Mistake] = []
        self.lines: dict[str, tuple[int, int]] = {}
        self.bad: set[str] = set()
        self._place = place
        self._pairs = Pairs()

    def top(self, node: Node) -> Values:
        found: Values = {}
        for key, (_, value) in self._keys(node, "", TOP).items():
            section = TOP[key]
            if section is POLICIES:
                found[key] = self._section(value, key, section)
                continue
            names = self._keys(value, key, None)
            found[key] = {name: self._section(each, f"{key}.{name}", section) for name, (_, each) in names.items()}
            if not names and key not in self.bad:
                self._say(value, key, "names nothing", "name at least one, or leave the key out")
        if "storage_tiers" not in found and "storage_tiers" not in self.bad and isinstance(node, MappingNode):
            self._say(node, "storage_tiers", "is missing", "name the repositories there, the nearest first")
        return found

    def _section(self, node: Node, where: str, section: Section) -> Any:
        if section.may_be_off and isinstance(node, ScalarNode) and node.value.lower() in (*_FALSE, *_TRUE):
            return OFF if node.value.lower() in _FALSE else {}
        fields = {field.key: field for field in section.fields}
        found: Values = {}
        for key, (_, value) in self._keys(node, where, fields).items():
            kind, below = fields[key].kind, f"{where}.{key}"
            if isinstance(kind, Section):
                found[key] = self._section(value, below, kind)
            elif self._has_value(value, below, kind):
                read = self._list if kind.is_list else self._scalar
                found[key] = read(value, below, kind)
        return {key: value for key, value in found.items() if value is not None or f"{where}.{key}" not in self.bad}

    def missing(self, where: str, field: Field) -> None:
        """Note that a key isn't there, at what it belongs to."""
        line, column = self.at(where)
        self._note(Mistake(line, column, f"{where}.{field.key}", "is missing", f"add `{field.key}`: {field.meaning}"))

    def at(self, where: str) -> tuple[int, int]:
        """Where this stands, or what it would belong to."""
        while where and where not in self.lines:
            where = where.rpartition(".")[0]
        return self.lines.get(where, (1, 1))

    def _keys(self, node: Node, where: str, known: Iterable[str] | None) -> dict[str, tuple[ScalarNode, Node]]:
        """The keys of a mapping; `known`: those that may be there, None for names that the user gives."""
        found: dict[str, tuple[ScalarNode, Node]] = {}
        if not self._has_value(node, where, None):
            return found
        if not isinstance(node, MappingNode):
            self._say(node, where, "takes keys and values", "write `key: value` in lines that are indented below it")
            return found
        for pair in self._pairs.of(node):
            if isinstance(pair, Mistake):
                self._note(pair._replace(where=where))
                continue
            key = pair.key.value
            below = ".".join(part for part in (where, shown(key)) if part)
            if key in found:
                if not pair.is_merged:
                    self._say(pair.key, below, f"stands here twice, first in line {found[key][0].start_mark.line + 1}")
            elif self._is_known(pair, below, known):
                found[key] = (pair.key, pair.value)
                self.lines[below] = (pair.key.start_mark.line + 1, pair.key.start_mark.column + 1)
        return found

    def _is_known(self, pair: Pair, where: str, known: Iterable[str] | None) -> bool:
        key = pair.key.value
        if known is None:
            if not _NAME.fullmatch(key) or key.lower() == "latest":
                hint = "write letters, digits, `_` and `-`, beginning with a letter or digit; latest is taken"
                self._say(pair.key, where, "can't be a name", hint)
                return False
        elif key not in known:
            hint = nearest(key, known)
            if hint.endswith("?"):
                self.bad.add(where.removesuffix(shown(key)) + hint.split("`")[1])  # it isn't missing too
            if elsewhere := homes(key):
                hint = hint if hint.endswith("?") else f"it belongs into {' or '.join(elsewhere)}"
            self._say(pair.key, where, "unknown key", hint)
            return False
        return True

    def _has_value(self, node: Node, where: str, kind: Kind | None) -> bool:
        if node.tag not in _TAGS:
            self._say(node, where, f"the tag {shown(node.tag)} is not known here", "leave it out")
            return False
        if node.tag == "tag:yaml.org,2002:null":
            hint = "give it one, or leave the key out"
            if node.value == "~":
                hint = "`~` alone is YAML's word for nothing; write `~/`"
            self._say(node, where, "has no value", hint)
            return False
        if kind is not None and not kind.is_list and not isinstance(node, ScalarNode):
            self._say(node, where, "takes one value", f"it takes: {kind.words}")
            return False
        return True

    def _scalar(self, node: Node, where: str, kind: Kind) -> Any:
        try:
            return kind.read(node.value, self._place)
        except Misfit as exc:
            self._say(node, where, exc.problem, exc.hint)
            return None

    def _list(self, node: Node, where: str, kind: Kind) -> tuple[Any, ...] | None:
        """Also a single value, which stands for a list of one."""
        nodes = node.value if isinstance(node, SequenceNode) else [node]
        if isinstance(node, MappingNode):
            self._say(node, where, f"takes a {kind.words}", "write [one, two], or one a line after `- `")
            return None
        if len(nodes) > ITEMS_MAX:
            self._say(node, where, f"has more than {ITEMS_MAX:,} items")
            return None
        found = []
        for number, each in enumerate(nodes):
            item = f"{where}[{number}]"
            self.lines[item] = (each.start_mark.line + 1, each.start_mark.column + 1)
            if not self._has_value(each, item, None):
                continue
            if not isinstance(each, ScalarNode):
                self._say(each, item, "is no single value", f"{where.rpartition('.')[2]} takes a {kind.words}")
                continue
            found.append(self._scalar(each, item, kind))
        return tuple(each for each in found if each is not None)

    def _say(self, node: Node, where: str, problem: str, hint: str = "") -> None:
        self._note(mistake_at(node, where, problem, hint))

    def _note(self, mistake: Mistake) -> None:
        self.mistakes.append(mistake)
        where = mistake.where
        while where:  # what is above is not whole either
            self.bad.add(where)
            where = where[: max(where.rfind("."), where.rfind("["), 0)]
