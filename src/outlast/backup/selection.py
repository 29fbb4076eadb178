"""Which paths a set of globs picks: `--exclude` of a backup, `--include` of a restore."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from outlast.errors import InvalidInput


def matcher(globs: Sequence[str]) -> Callable[[bytes], bool]:
    """A function that tells whether a relative path, or a folder it lies in, fits one of the globs.

    As in .gitignore: a glob without "/" is matched against each part of the path, one with "/"
    against the path from the root. `*` and `?` stay within a part, `**` crosses parts.

    >>> matcher(["*.tmp", "logs/**"])(b"a/b.tmp"), matcher(["a/*.pt"])(b"a/b/c.pt")
    (True, False)
    """
    patterns = [_translate(glob) for glob in globs]
    if not patterns:
        return lambda path: False
    joined = re.compile("|".join(patterns), re.DOTALL)
    # As text, so that `?` is a character and not a byte; names that are no UTF-8 keep their odd bytes.
    return lambda path: joined.match(path.decode("utf-8", "surrogateescape")) is not None


def _translate(glob: str) -> str:
    text = glob.strip("/")
    if not text:
        raise InvalidInput(f"the pattern {glob!r} matches nothing.", hint="Give a glob such as '*.tmp' or 'logs/**'.")
    anchored = "/" in glob.rstrip("/")
    parts = re.findall(r"\*\*/?|\*|\?|\[!?\]?[^\]]*\]|.", text, re.DOTALL)
    pattern = ("" if anchored else "(?:.*/)?") + "".join(map(_regex, parts)) + "(?:/.*)?\\Z"
    try:
        re.compile(pattern)
    except re.error as exc:
        raise InvalidInput(f"the pattern {glob!r} can't be understood: {exc}.") from exc
    return pattern


def _regex(part: str) -> str:
    if part == "**/":
        return "(?:.*/)?"
    if part == "**":
        return ".*"
    if part == "*":
        return "[^/]*"
    if part == "?":
        return "[^/]"
    if part.startswith("[") and part.endswith("]") and part.strip("[!]"):
        negated = part.startswith("[!")
        inner = re.sub(r"([\\\[\]&|~^])", r"\\\1", part[2 if negated else 1 : -1])
        return f"(?!/)[{'^' if negated else ''}{inner}]"
    return re.escape(part)
