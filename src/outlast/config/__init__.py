"""outlast.yaml: strict, and explained. It becomes the frozen policy; every mistake is told at once, with its line.

config = outlast.config.load("outlast.yaml")
config.policy.tiers[0].url
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from outlast.config.build import build
from outlast.config.decode import Reader
from outlast.config.document import FILE_BYTES_MAX, Mistake, Unreadable, root
from outlast.config.judge import judge
from outlast.config.values import Place
from outlast.errors import InvalidInput, NotFound
from outlast.tiers.policy import Policy

__all__ = ["FILE", "VARIABLE", "Config", "Mistake", "Mistaken", "find", "load", "read"]

FILE = "outlast.yaml"
VARIABLE = "OUTLAST_CONFIG"


class Config(NamedTuple):
    """What a file says. Paths in the policy are absolute."""

    policy: Policy
    path: str
    warnings: tuple[Mistake, ...] = ()
    """what can be done as it says, and is probably not meant"""
    origins: Mapping[str, str] = {}
    """for each key that isn't written in its place: `default`, or from where it was taken"""


class Mistaken(InvalidInput):
    """The file can't be used. `mistakes` has all that is wrong, in the order of lines."""

    def __init__(self, path: str, mistakes: tuple[Mistake, ...], warnings: tuple[Mistake, ...] = ()) -> None:
        first = mistakes[0]._replace(hint="").text(path)
        if len(mistakes) == 1:
            super().__init__(f"{first}. Nothing was done.", hint=_sentence(mistakes[0].hint))
        else:
            told = f"{len(mistakes)} mistakes in the configuration, the first: {first}. Nothing was done."
            super().__init__(told, hint=f"`outlast config check {path}` names them all.")
        self.path = path
        self.mistakes = mistakes
        self.warnings = warnings


def find(given: str | None = None) -> str:
    """The path of the file: `given`, else OUTLAST_CONFIG, else ./outlast.yaml. Raises `NotFound`."""
    path = given or os.environ.get(VARIABLE) or FILE
    if os.path.exists(path):
        return path
    how = "" if given else f", which {VARIABLE} names," if os.environ.get(VARIABLE) else ""
    raise NotFound(
        f"the configuration {path}{how} is not there; nothing was done.",
        hint=f"Give its path, set {VARIABLE}, or write {FILE} here.",
    )


def load(path: str, environment: Mapping[str, str] = os.environ) -> Config:
    """The policy that a file states, relative paths counted from its folder.

    Raises `Mistaken`, an `InvalidInput` with all mistakes, and `NotFound`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError as exc:
        raise NotFound(f"the configuration {path} is not there; nothing was done.") from exc
    return read(data, path, environment)


def read(data: bytes, path: str, environment: Mapping[str, str] = os.environ) -> Config:
    """What `load` gives for a file of these bytes. Raises `Mistaken`."""
    reader = Reader(Place(os.path.dirname(os.path.abspath(path)), environment))
    try:
        top = reader.top(root(data))
    except Unreadable as exc:
        raise Mistaken(path, (*reader.mistakes, exc.mistake)) from exc
    built = build(reader, top)
    warnings: list[Mistake] = []
    for found in judge(built.policy, frozenset(reader.lines)):
        if not reader.bad.isdisjoint((found.where, *found.hangs_on)):
            continue  # it may follow from a mistake that is told already
        mistake = Mistake(*reader.at(found.where), found.where, found.problem, found.hint)
        (warnings if found.is_warning else reader.mistakes).append(mistake)
    warnings.sort()
    if reader.mistakes:
        raise Mistaken(path, tuple(sorted(reader.mistakes)), tuple(warnings))
    return Config(built.policy, path, tuple(warnings), built.origins)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if not text or text.endswith((".", "?")) else ".")
