"""How figures, times and names are written for people. JSON gets the plain values instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from outlast.errors import InvalidInput

ID_CHARACTERS = 8

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def size_text(count: int) -> str:
    """Bytes in binary units, three digits or so.

    >>> size_text(1023), size_text(90_868_376), size_text(1 << 40)
    ('1,023 B', '86.7 MiB', '1.0 TiB')
    """
    if count < 1024:
        return f"{count:,} B"
    value, unit = count / 1024, 0
    while value >= 1023.95 and unit + 1 < len(_UNITS):
        value, unit = value / 1024, unit + 1
    return f"{value:,.0f} {_UNITS[unit]}" if value >= 99.95 else f"{value:.1f} {_UNITS[unit]}"


def count_text(count: int, thing: str) -> str:
    """
    >>> count_text(1, "file"), count_text(100_000, "file")
    ('1 file', '100,000 files')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def duration_text(seconds: float) -> str:
    """
    >>> duration_text(0.034), duration_text(4.21), duration_text(192), duration_text(7500)
    ('0.03 s', '4.2 s', '3 min 12 s', '2 h 05 min')
    """
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 0.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def time_text(rfc3339: str) -> str:
    """A time of the repository, which is UTC, to the second.

    >>> time_text("2025-06-15T15:06:40.123456Z")
    '2025-06-15 15:06:40'
    """
    return rfc3339[:19].replace("T", " ")


def short_id(identifier: str) -> str:
    return identifier[:ID_CHARACTERS]


def printable(text: str) -> str:
    """The text with whatever could move the cursor or hide characters written as an escape.

    >>> printable("two\\nlines \\x1b[31mred"), printable("café")
    ('two\\\\nlines \\\\x1b[31mred', 'café')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def path_shown(path: str) -> str:
    """The file name that a manifest path stands for, safe to print.

    >>> path_shown("50%25/caf%E9%0A"), path_shown("a b.pt")
    ('50%/caf\\\\xe9\\\\n', 'a b.pt')
    """
    return printable(_raw(path).decode("utf-8", "backslashreplace"))


def path_quoted(path: str) -> str:
    """The file name that a manifest path stands for, as a word to paste into a shell.

    >>> print(path_quoted("step 1.pt"), path_quoted("-x"), path_quoted("it's%0A"))
    'step 1.pt' ./-x $'it\\047s\\012'
    """
    import shlex

    raw = _raw(path)
    raw = b"./" + raw if raw.startswith(b"-") else raw
    shown = raw.decode("utf-8", "surrogateescape")
    if shown.isprintable():
        return shlex.quote(shown)
    return "$'" + "".join(chr(c) if 32 <= c < 127 and c not in b"'\\" else f"\\{c:03o}" for c in raw) + "'"


def _raw(path: str) -> bytes:
    if "%" not in path:
        return path.encode("utf-8", "surrogateescape")
    from urllib.parse import unquote_to_bytes

    return unquote_to_bytes(path)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: str = "") -> Iterator[str]:
    """Aligned columns, two spaces apart; those whose heading is in `right` (split at spaces) to the right."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    to_right = {column for column, name in enumerate(header) if name in right.split()}
    for line in lines:
        cells = (
            cell.rjust(width) if column in to_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def shape_text(shape: Iterable[int]) -> str:
    return f"[{', '.join(str(dimension) for dimension in shape)}]"


_SPAN = re.compile(r"(?:([0-9]{1,6})d)?(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s)?")


def span_seconds(option: str, text: str) -> int:
    """How long a span of time is; here `m` are minutes. Raises `InvalidInput`.

    >>> span_seconds("--grace", "1d12h")
    129600
    """
    parts = _SPAN.fullmatch(text.strip())
    if parts is None or not any(parts.groups()):
        raise InvalidInput(
            f"{option} {text!r} can't be understood; nothing was done.",
            hint="Write days, hours, minutes and seconds, for example 30s, 10m, 2h or 1d12h.",
        )
    days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return 86400 * days + 3600 * hours + 60 * minutes + seconds


def share_of(option: str, text: str, hint: str = "Give it in percent, as 5%.") -> float:
    """A part of the whole, between 0 and 1. Raises `InvalidInput`.

    >>> share_of("--max-unused", "5%"), share_of("--max-unused", "0.05")
    (0.05, 0.05)
    """
    try:
        found = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise InvalidInput(f"{option} {text!r} can't be understood; nothing was done.", hint=hint)
    return found
