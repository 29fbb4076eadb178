"""The object `format`: what a repository is. Its creation is the creation of the repository."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import msgspec

from outlast import records
from outlast.errors import Corrupt, Exists, InvalidInput, NotFound, Refused
from outlast.records import FORMAT_VERSION, Format
from outlast.repo import pack
from outlast.store.base import ObjectStore
from outlast.store.lock import LOCK_DAYS_MAX

SUMS = "sums"
"""Manifests may say that a chunk is the sum of others. Who doesn't know it would prune those."""

FEATURES = [SUMS]
"""Mandatory features this version knows beyond format version 1. New repositories have all of them."""

PACK_BYTES_MAX = 1 << 30
OBJECT_BYTES_MAX = 1 << 20
"""of `format` and of a key"""


WAY_OUT = ("FORMAT.md", "rescue.py")
"""what is put into every repository, so that it can be read when Outlast itself is gone"""


def refuse_taken(store: ObjectStore) -> None:
    """Raise `Refused` where there is anything but what an `init` leaves that was killed before its end."""
    for found in store.list(""):
        if found.name == "format" or found.name.startswith(("log/", "packs/")):
            raise Refused(f"{store.url} holds a repository already; nothing was changed.")
        if not found.name.startswith("keys/") and found.name not in WAY_OUT:
            raise Refused(
                f"{store.url} is not empty ({found.name} is there); nothing was changed.",
                hint="Make the repository in a folder or under a prefix of its own.",
            )


def leave_a_way_out(store: ObjectStore) -> None:
    """Put the description of the format and a program that restores by it alone beside what they describe."""
    for name in WAY_OUT:
        content = Path(records.__file__).with_name(name).read_bytes()
        with suppress(Exists):
            store.put_if_absent(name, [content])


def check_sizes(form: Format) -> None:
    """Refuse chunking that readers would refuse, or that would fill the memory."""
    cut = form.chunking
    if not (
        512 <= cut.block_bytes <= pack.CHUNK_BYTES_MAX
        and 64 <= cut.min_bytes <= 1 << 20
        and 256 <= cut.avg_bytes <= 4 << 20
        and 1024 <= cut.max_bytes <= 16 << 20
        and cut.min_bytes < cut.avg_bytes < cut.max_bytes
        and 1 << 10 <= form.pack_bytes <= PACK_BYTES_MAX
    ):
        raise InvalidInput(f"these sizes of chunks and packs are out of bounds: {cut}, pack_bytes={form.pack_bytes}.")


def check_lock_days(days: int) -> None:
    if not 0 <= days <= LOCK_DAYS_MAX:
        raise InvalidInput(f"objects can be locked for 1 to {LOCK_DAYS_MAX} days, not {days}; nothing was made.")


def prove_create_if_absent(store: ObjectStore, form: bytes) -> None:
    """A store that lets a second create through would lose commits without a word: find out now.

    Where it does, the new and empty repository is spoilt, which is what it would be worth.
    """
    try:
        store.put_if_absent("format", [form, b"a second create must be refused"])
    except Exists:
        return
    raise Refused(
        f"{store.url} overwrites objects that should only be created once, so no repository is safe there.",
        hint="`outlast doctor store` shows what it does. Use a store that honours `If-None-Match: *`.",
    )


def get_or_none(store: ObjectStore, name: str) -> bytes | None:
    try:
        if store.stat(name).size_bytes > OBJECT_BYTES_MAX:
            raise Corrupt(f"{name} at {store.url} is far too large to be what it should.")
        return store.get(name)
    except NotFound:
        return None


class _Version(msgspec.Struct):
    magic: str = ""
    version: int = 0
    features: list[str] = []


def parse_format(data: bytes, url: str) -> Format:
    what = f"the object `format` of {url}"
    head = records.parse(data, _Version, what)  # before the hash: a newer version may end differently
    if head.magic != "outlast repository":
        raise Corrupt(f"{what} is not that of an outlast repository.")
    unknown = sorted(set(head.features) - set(FEATURES))
    if head.version > FORMAT_VERSION or unknown:
        needs = f"version {head.version}" + (f" with {', '.join(unknown)}" if unknown else "")
        raise Refused(
            f"the repository at {url} is of format {needs}; this program knows version {FORMAT_VERSION}.",
            hint="Upgrade outlast.",
        )
    form = records.parse_object(data, Format, what)
    try:
        check_sizes(form)
        check_lock_days(form.lock_days or 0)
    except InvalidInput as exc:
        raise Corrupt(f"{what} can't be right: {exc.message}") from exc
    return form
