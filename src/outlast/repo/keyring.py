"""The key slots of an encrypted repository, `keys/<id>`: each holds the keys, wrapped by one passphrase."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from outlast import records
from outlast.errors import Corrupt, WrongKey
from outlast.records import Format
from outlast.repo import seal
from outlast.repo.form import OBJECT_BYTES_MAX
from outlast.repo.seal import Keys
from outlast.store.base import ObjectInfo, ObjectStore

_SLOTS_MAX = 64

Secret = Callable[[], bytes]
"""Gives the passphrase when it is needed; called at most once per open."""


def read_slot(store: ObjectStore, info: ObjectInfo) -> seal.KeySlot:
    """A key slot; `Corrupt` names it."""
    if info.size_bytes > OBJECT_BYTES_MAX:
        raise Corrupt(f"{info.name} is far too large to be a key.")
    return records.parse_object(store.get(info.name), seal.KeySlot, info.name)


def open_keys(store: ObjectStore, form: Format, secret: Secret | None) -> Keys:
    if secret is None:
        raise WrongKey(
            f"the repository at {store.url} is encrypted and no passphrase was given.",
            hint="Set OUTLAST_PASSPHRASE, or use --passphrase-file or --passphrase-command.",
        )
    passphrase = secret()
    best: Keys | None = None
    damaged: list[str] = []
    slots = list(islice(store.list("keys/"), _SLOTS_MAX))
    for info in slots:
        try:
            slot = read_slot(store, info)
        except Corrupt:
            damaged.append(info.name)  # a damaged slot must not keep a good one from opening
            continue
        keys = seal.unwrap_keys(slot, passphrase)
        if keys and keys.repository.hex() == form.id and (best is None or keys.epoch > best.epoch):
            best = keys
    if best is None and (damaged or not slots):
        what = f"{', '.join(damaged)} can't be read" if damaged else "all of keys/ is missing"
        raise Corrupt(
            f"no key of the repository at {store.url} was opened, and {what}; nothing was touched.",
            hint="Copy the key back from a replica: it is small and never changes.",
        )
    if best is None:
        raise WrongKey(f"this passphrase opens no key of the repository at {store.url}; nothing was touched.")
    return best
