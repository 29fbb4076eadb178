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
    joined = re.compile(b"|".join(patterns), re.DOTALL)
    return lambda path: joined.match(path) is not None


def _translate(glob: str) -> bytes:
    text = glob.strip("/")
    if not text:
        raise InvalidInput(f"the pattern {glob!r} matches nothing.", hint="Give a glob such as '*.tmp' or 'logs/**'.")
    anchored = "/" in glob.rstrip("/")
    parts = re.findall(r"\*\*/?|\*|\?|\[!?\]?[^\]]*\]|.", text, re.DOTALL)
    pattern = "".join(map(_regex, parts))
    body = pattern.encode("utf-8", "surrogateescape")
    return (b"" if anchored else b"(?:.*/)?") + body + b"(?:/.*)?\\Z"


def _regex(part: str) -> str:
    if part == "**/":
        return "(?:.*/)?"
    if part == "**":
        return ".*"
    if part == "*":
        return "[^/]*"
    if part == "?":
        return "[^/]"
    if part.startswith("[") and part.endswith("]") and len(part) > 2:
        inner = part[1:-1].replace("\\", "\\\\")
        return f"[{'^' + inner[1:] if inner.startswith('!') else inner}]"
    return re.escape(part)
