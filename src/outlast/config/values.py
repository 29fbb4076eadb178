"""The values of outlast.yaml as people write them, read and written. Pure, but for `~` and links in paths.

Each kind reads the text that stands in the file, not what YAML would make of it: `12:30` is a number to YAML 1.1, `off`
a truth value and `010` eight. What can't be understood raises `Misfit`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from outlast.backup.selection import matcher
from outlast.errors import InvalidInput
from outlast.store.classes import ARCHIVES, AT_ONCE
from outlast.tiers.policy import DAY_SECONDS

DURATION_SECONDS_MAX = 1000 * 366 * DAY_SECONDS
COUNT_MAX = 1_000_000
TEXT_CHARACTERS_MAX = 4096
BUCKETS = ("s3", "gs", "az")


class Misfit(Exception):
    """A value that can't be taken: what is wrong with it, and what to write instead."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


class Place(NamedTuple):
    """What relative paths and `${NAME}` stand for."""

    folder: str
    environment: Mapping[str, str]


class Kind(NamedTuple):
    """A kind of value: what to call it, how it is read, and how it is written so that it reads the same again."""

    words: str
    read: Callable[[str, Place], Any]
    write: Callable[[Any], str]
    is_list: bool = False


def _kind(words: str, read: Callable[[str], Any], write: Callable[[Any], str] = str) -> Kind:
    return Kind(words, lambda text, place: read(text), write)


def nearest(word: str, known: Iterable[str]) -> str:
    """What was meant, as a question; with nothing near, what there is."""
    by_form = {each.lower().replace("-", "_"): each for each in known}
    near = get_close_matches(word.lower().replace("-", "_"), by_form, 1)
    return f"did you mean `{by_form[near[0]]}`?" if near else f"known are {', '.join(by_form.values())}"


def shown(text: str) -> str:
    """A text of the file inside a message: one line, not too long."""
    short = text if len(text) <= 60 else text[:57] + "..."
    return short if short.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in short)


_UNITS = {
    1: ("s", "sec", "secs", "second", "seconds"),
    60: ("min", "mins", "minute", "minutes"),
    3600: ("h", "hr", "hrs", "hour", "hours"),
    DAY_SECONDS: ("d", "day", "days"),
    7 * DAY_SECONDS: ("w", "week", "weeks"),
    31 * DAY_SECONDS: ("month", "months"),
    366 * DAY_SECONDS: ("y", "year", "years"),
}
_SECONDS_OF = {word: seconds for seconds, words in _UNITS.items() for word in words}
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,9})?"
_PART = re.compile(rf"({_NUMBER})\s*([A-Za-z]+)\s*")
_DURATION_HINT = "write a number and a unit, as `7 days`, `12h` or `90 min`"


def read_duration(text: str) -> int:
    """Whole seconds.

    >>> read_duration("7_days"), read_duration("12h"), read_duration("1 h 30 min"), read_duration("0.5 days")
    (604800, 43200, 5400, 43200)
    """
    plain = text.replace("_", " ").strip()
    if plain.startswith("-") or re.fullmatch(r"0+(\.0+)?", plain):
        raise Misfit(f"`{shown(text)}` is no time to come", _DURATION_HINT)
    if re.fullmatch(_NUMBER, plain):
        raise Misfit(f"`{shown(text)}` has no unit", f"write `{plain} days` or `{plain} h`")
    if re.fullmatch(r"[0-9]+(:[0-9]+)+", plain):
        hours, minutes = plain.split(":")[:2]
        raise Misfit(f"`{shown(text)}` is no duration", f"write `{hours} h {minutes} min`")
    if plain.lower() in ("indefinite", "forever"):
        raise Misfit(f"`{shown(text)}` can't be said here", _DURATION_HINT)
    parts = _PART.findall(plain)
    if not parts or "".join(_PART.split(plain)[::3]):
        raise Misfit(f"`{shown(text)}` is no duration", _DURATION_HINT)
    seconds = 0.0
    for number, unit in parts:
        word = unit.lower()
        if word in ("m", "mo"):
            raise Misfit(f"`{unit}` could be minutes or months", f"write `{number} min` or `{number} months`")
        if word not in _SECONDS_OF:
            near = nearest(word, [each for each in _SECONDS_OF if len(each) > 1])
            raise Misfit(f"`{shown(unit)}` is no unit of time", near if near.endswith("?") else _DURATION_HINT)
        seconds += float(number) * _SECONDS_OF[word]
    if round(seconds) < 1:
        raise Misfit(f"`{shown(text)}` is less than a second")
    if seconds > DURATION_SECONDS_MAX:
        raise Misfit(f"`{shown(text)}` is more than 1000 years")
    return round(seconds)


def write_duration(seconds: int) -> str:
    """
    >>> [write_duration(each) for each in (604800, 86400, 43200, 5400, 45)]
    ['7 days', '1 day', '12 h', '90 min', '45 s']
    """
    if seconds % DAY_SECONDS == 0:
        return f"{seconds // DAY_SECONDS} day{'' if seconds == DAY_SECONDS else 's'}"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds % size == 0:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _or_word(word: str, meaning: Any, words: str, other: Kind) -> Kind:
    """Another kind, and one word beside it."""

    def read(text: str, place: Place) -> Any:
        return meaning if text.strip().lower() == word else other.read(text, place)

    return Kind(words, read, lambda value: word if value == meaning else other.write(value))


_RATE = re.compile(rf"({_NUMBER})\s*([A-Za-z]+)\s*/\s*(?:s|sec|second)")
_RATE_HINT = "write it as `50 MB/s` or `400 Mbit/s`"
_BYTES_OF = {
    "B": 1.0,
    **{prefix + "B": 1000.0**power for power, prefix in enumerate(("k", "M", "G", "T"), 1)},
    "KB": 1000.0,
    **{prefix + "iB": 1024.0**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
    "kiB": 1024.0,
    **{prefix + "bit": 1000.0**power / 8 for power, prefix in enumerate(("k", "M", "G", "T"), 1)},
}


def read_rate(text: str) -> float:
    """Bytes per second.

    >>> read_rate("50 MB/s"), read_rate("10MiB/s"), read_rate("400 Mbit/s")
    (50000000.0, 10485760.0, 50000000.0)
    """
    found = _RATE.fullmatch(text.replace("_", " ").strip())
    if found is None:
        raise Misfit(f"`{shown(text)}` is no number of bytes per second", _RATE_HINT)
    number, unit = found.groups()
    if unit not in _BYTES_OF:
        if unit.endswith("b") and unit[:-1] in ("k", "K", "M", "G", "T"):
            big = unit[:-1]
            raise Misfit(f"`{unit}` could be bytes or bits", f"write `{number} {big}B/s` or `{number} {big}bit/s`")
        raise Misfit(f"`{shown(unit)}` is no unit of bytes", _RATE_HINT)
    rate = float(round(float(number) * _BYTES_OF[unit]))
    if not 1 <= rate <= 1e15:
        raise Misfit(f"`{shown(text)}` moves nothing" if rate < 1 else f"`{shown(text)}` is too much", _RATE_HINT)
    return rate


def write_rate(rate: float) -> str:
    """
    >>> write_rate(50e6), write_rate(10 * 1024**2), write_rate(1234.0)
    ('50 MB/s', '10 MiB/s', '1234 B/s')
    """
    units = ("TB", "TiB", "GB", "GiB", "MB", "MiB", "kB", "KiB", "B")
    unit = next(each for each in units if rate % _BYTES_OF[each] == 0)
    return f"{rate / _BYTES_OF[unit]:.0f} {unit}/s"


def _read_count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9_]*", text.strip()) or int(text.replace("_", "")) > COUNT_MAX:
        raise Misfit(f"`{shown(text)}` is no number from 1 to {COUNT_MAX:,}")
    return int(text.replace("_", ""))


def _read_text(text: str) -> str:
    if not text.strip():
        raise Misfit("is empty", "give it a value, or leave the key out")
    if not text.isprintable():
        raise Misfit("holds characters that can't be printed", "write it in one line, without control characters")
    if len(text) > TEXT_CHARACTERS_MAX:
        raise Misfit(f"is longer than {TEXT_CHARACTERS_MAX:,} characters")
    return text


def _read_glob(text: str) -> str:
    try:
        matcher([_read_text(text)])
    except InvalidInput as exc:
        raise Misfit(exc.message.rstrip("."), exc.hint.rstrip(".")) from exc
    return text


def _one_of(words: tuple[str, ...], text: str) -> str:
    if text not in words:
        raise Misfit(f"`{shown(text)}` is unknown", nearest(text, words))
    return text


def _quoted(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def choice(*words: str) -> Kind:
    return _kind(_quoted(words), lambda text: _one_of(words, text))


def _read_at_once(text: str) -> str:
    if text in ARCHIVES:
        raise Misfit(f"`{text}` has to be thawed before it is read", f"write `archive: {{class: {text}}}`")
    if text == "STANDARD":
        raise Misfit("`STANDARD` is where packs are created without it", "leave it out")
    return _one_of(AT_ONCE, text)


def _read_archive(text: str) -> str:
    if text in AT_ONCE:
        raise Misfit(f"`{text}` is read at once, and is no archive", f"write `storage_class: {text}` in the tier")
    return _one_of(ARCHIVES, text)


def _read_currency(text: str) -> str:
    if not re.fullmatch(r"[A-Z]{3}", text):
        raise Misfit(f"`{shown(text)}` is no currency", "write its three letters, as EUR")
    return text


def _read_amount(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", text.strip()):
        raise Misfit(f"`{shown(text)}` is no amount", "write a number, as `0.09`")
    return float(text)


def write_amount(amount: float) -> str:
    """
    >>> [write_amount(each) for each in (5.0, 0.09, 0.00099, 0.0)]
    ['5', '0.09', '0.00099', '0']
    """
    return f"{amount:.9f}".rstrip("0").rstrip(".")


LEVELS = tuple(f"L{number}" for number in range(6))


def _read_level(text: str) -> int:
    if text not in LEVELS:
        raise Misfit(f"`{shown(text)}` is no level", f"the levels are {', '.join(LEVELS)}")
    return LEVELS.index(text)


# A value is put in for ${NAME}; "$${" stands for "${" itself.
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)\}?")


def _with_variables(text: str, place: Place) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name is None:
            return "${"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) or not found[0].endswith("}"):
            raise Misfit(f"`{shown(found[0])}` names no variable", "write ${NAME}; for the characters `${` write `$${`")
        if not place.environment.get(name):
            raise Misfit(f"the environment variable {shown(name)} is not set", f"set {shown(name)} where outlast runs")
        return place.environment[name]

    filled = _VARIABLE.sub(value, _read_text(text))
    if not filled.isprintable():
        raise Misfit("holds characters that can't be printed, from a variable")
    return filled


def _local_path(text: str, place: Place) -> str:
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        raise Misfit(f"whose home `{shown(text)}` means is not known", "write the whole path")
    path = os.path.join(place.folder, path)
    # What follows a link is not the folder before it, so "a/../b" is left as it is.
    return path if ".." in path.split("/") else os.path.normpath(path)


def _read_path(text: str, place: Place) -> str:
    filled = _with_variables(text, place)
    if "://" in filled:
        raise Misfit("is a URL; sources are folders and files on this machine")
    return _local_path(filled, place)


def _read_url(text: str, place: Place) -> str:
    """A path, absolute, or a bucket with its prefix. Messages never repeat what could hold a secret."""
    url = _with_variables(text, place)
    scheme, separator, _ = url.partition("://")
    known = ("file", *BUCKETS)
    if not separator:
        if re.match(rf"({'|'.join((*known, 'memory'))}):", url):
            raise Misfit("names no store", "write a path, or s3://BUCKET/PREFIX; for a folder of that name, ./NAME")
        return _local_path(url, place)
    scheme = scheme.lower()
    if scheme == "memory":
        raise Misfit("memory:// lives only inside one process", "write a folder, as /dev/shm/outlast for memory")
    if scheme not in known:
        hint = "write a path, s3://BUCKET/PREFIX, gs://… or az://…"
        raise Misfit(f"`{shown(scheme)}://` is no kind of store", hint)
    try:
        parts = urlsplit(url)
    except ValueError as exc:
        raise Misfit("is no URL", "write s3://BUCKET/PREFIX") from exc
    if "@" in parts.netloc or (scheme != "file" and (parts.query or parts.fragment)):
        raise Misfit(
            "may hold nothing but bucket and prefix, and no key or password",
            "give credentials in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if scheme == "file":
        path = unquote(url.partition("://")[2].removeprefix(parts.netloc))
        if parts.netloc not in ("", "localhost") or not path.startswith("/") or not path.isprintable():
            raise Misfit("names no folder of this machine", "write a path, as /data/backups")
        return _local_path(path, place)
    if not parts.netloc:
        raise Misfit("names no bucket", f"write {scheme}://BUCKET/PREFIX")
    return f"{scheme}://{url.partition('://')[2]}".rstrip("/")


def _write_path(path: str) -> str:
    return path.replace("${", "$${")


DURATION = _kind("duration", read_duration, write_duration)
RETENTION = _or_word("indefinite", None, "duration, `indefinite`", DURATION)
INTERVAL = _or_word("auto", "auto", "duration, `auto`", DURATION)
RATE = _or_word("unlimited", None, "bytes per second, `unlimited`", _kind("", read_rate, write_rate))
COUNT = _kind("number", _read_count)
TEXT = _kind("text", _read_text)
COMMAND = _kind("command", _read_text)
LEVEL = _kind("`L0` to `L5`", _read_level, LEVELS.__getitem__)
URL = Kind("path, `s3://…`, `gs://…`, `az://…`", _read_url, _write_path)
PATHS = Kind("list of paths", _read_path, _write_path, is_list=True)
GLOBS = Kind("list of globs", lambda text, place: _read_glob(text), str, is_list=True)
STORAGE_CLASS = _kind(_quoted(AT_ONCE), _read_at_once)
ARCHIVE_CLASS = _kind(_quoted(ARCHIVES), _read_archive)
CURRENCY = _kind("three letters", _read_currency)
AMOUNT = _kind("number", _read_amount, write_amount)
