"""The key slots of an encrypted repository, `keys/<id>`: each holds the keys, wrapped by one passphrase.

**Rotation** makes a new data key. Its number, the epoch, is first reserved in the log, so that no two
keys ever have the same one. Then a slot that holds all keys is made durable, and then a log entry, the
last one under the old key, says that the new one is in use. Only that entry makes it so: a slot that
holds a key of which the log says nothing is what a rotation left that was killed or came second, and
nothing is ever sealed with such a key. Last, the old slots of the same passphrase are deleted.

**Removal** is in the log before the slot is deleted, and is committed only where another slot holds the
newest key. So whatever runs at the same time, the log's order sees to it that one is left.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import msgspec

from outlast import records
from outlast.clock import Clock
from outlast.errors import Busy, Corrupt, InvalidInput, NotFound, OutlastError, Refused, WrongKey
from outlast.events import Event
from outlast.records import Format
from outlast.repo import seal
from outlast.repo.form import OBJECT_BYTES_MAX
from outlast.repo.seal import Keys
from outlast.repo.state import KEY, State
from outlast.store.base import ObjectInfo, ObjectStore

if TYPE_CHECKING:
    from outlast.repo.repository import Repository

SLOTS_MAX = 64
LABEL_CHARACTERS_MAX = 200
_TRIES = 5
_ID_CHARACTERS_MIN = 4
_deriving = threading.Lock()
"""OpenSSL derives a key in threads of one pool: two derivations at once wait for each other for ever."""

Secret = Callable[[], bytes]
"""Gives the passphrase when it is needed; called at most once per open."""


class Slot(msgspec.Struct, frozen=True):
    """A key slot. `epochs`: the data keys in it, None where the passphrase doesn't open it."""

    id: str
    created: str = ""
    label: str = ""
    epochs: frozenset[int] | None = None
    epoch: int | None = None
    """the newest data key in use that it holds, None where nothing tells"""
    is_damaged: bool = False
    is_removed: bool = False
    """the log says that it was removed, but it is still there"""


class KeyChange(msgspec.Struct, frozen=True):
    """What was done to the keys. `left_behind`: slots that do not hold the newest data key."""

    slot: str
    epoch: int
    replaced: tuple[str, ...] = ()
    """slots of the same passphrase that this one stands in for; they are deleted"""
    left_behind: tuple[Slot, ...] = ()


class _Overtaken(Busy):
    """Somebody else changed the keys since this change was prepared."""


def read_slot(store: ObjectStore, info: ObjectInfo) -> seal.KeySlot:
    """A key slot; `Corrupt` names it."""
    if info.size_bytes > OBJECT_BYTES_MAX:
        raise Corrupt(f"{info.name} is far too large to be a key.")
    return records.parse_object(store.get(info.name), seal.KeySlot, info.name)


class _Opened(msgspec.Struct):
    """One object below `keys/`: what it is, and what the passphrase opens in it."""

    id: str
    slot: seal.KeySlot | None = None
    keys: Keys | None = None


def _read_slots(store: ObjectStore) -> list[_Opened]:
    """Every slot; one that is damaged must not keep the others from opening."""
    for _ in range(_TRIES):
        found, is_whole = [], True
        for info in islice(store.list("keys/"), SLOTS_MAX):
            each = _Opened(info.name.removeprefix("keys/"))
            try:
                each.slot = read_slot(store, info)
            except NotFound:
                is_whole = False  # it was removed since it was listed, and another may have come in its place
                continue
            except Corrupt:
                pass
            found.append(each)
        if is_whole:
            break
    return found


def _open_slots(store: ObjectStore, repository_id: str, passphrase: bytes) -> list[_Opened]:
    found = _read_slots(store)
    for each in found:
        with _deriving:
            keys = seal.unwrap_keys(each.slot, passphrase) if each.slot else None
        each.keys = keys if keys and keys.repository.hex() == repository_id else None
    return found


def _data_keys(opened: Sequence[_Opened]) -> dict[int, bytes]:
    """All data keys in these slots. No two ever have one number, unless the store brought back old objects."""
    found: dict[int, bytes] = {}
    for each in opened:
        for epoch, key in each.keys.epochs.items() if each.keys else ():
            if found.setdefault(epoch, key) != key:
                raise Corrupt(
                    f"two slots hold different data keys of epoch {epoch}, one of them is keys/{each.id}: the store "
                    "serves objects of the past. Nothing was touched.",
                    hint="Remove from keys/ what was removed before, or copy the repository from a replica.",
                )
    return found


def open_keys(store: ObjectStore, form: Format, secret: Secret | None) -> Keys:
    """What the passphrase opens. Which of the data keys is in use, the log tells."""
    if secret is None:
        raise WrongKey(
            f"the repository at {store.url} is encrypted and no passphrase was given.",
            hint="Set OUTLAST_PASSPHRASE, or use --passphrase-file or --passphrase-command.",
        )
    passphrase = secret()
    slots = _open_slots(store, form.id, passphrase)
    found = next((each.keys for each in slots if each.keys), None)
    if found is not None:
        found.epochs = _data_keys(slots)
        return _reloading(found, store, passphrase)
    damaged = [f"keys/{each.id}" for each in slots if each.slot is None]
    if damaged or not slots:
        what = f"{', '.join(damaged)} can't be read" if damaged else "all of keys/ is missing"
        raise Corrupt(
            f"no key of the repository at {store.url} was opened, and {what}; nothing was touched.",
            hint="Copy the key back from a replica: it is small and never changes.",
        )
    raise WrongKey(f"this passphrase opens no key of the repository at {store.url}; nothing was touched.")


def make_keys(store: ObjectStore, repository_id: bytes, anchor: str, passphrase: bytes, clock: Clock) -> Keys:
    """The keys of a new repository, durable in its first slot."""
    keys = seal.new_keys(repository_id, clock.random_bytes(2 * seal.KEY_BYTES), anchor)
    _write_slot(store, keys, passphrase, "", clock)
    return _reloading(keys, store, passphrase)


def _reloading(keys: Keys, store: ObjectStore, passphrase: bytes) -> Keys:
    keys.passphrase = passphrase
    keys.reload = lambda: _data_keys(_open_slots(store, keys.repository.hex(), passphrase))
    return keys


def _write_slot(store: ObjectStore, keys: Keys, passphrase: bytes, label: str, clock: Clock) -> str:
    """Make a slot durable, and read it back: what is sealed later may be opened by nothing else."""
    created = records.time_text(clock.now_ns())
    with _deriving:
        slot = seal.wrap_keys(keys, passphrase, clock.random_bytes(seal.SALT_BYTES), created, label)
    identifier = clock.random_bytes(16).hex()
    name = f"keys/{identifier}"
    store.put_if_absent(name, [records.canonical_object(slot)])
    try:
        found = store.get(name)
    except NotFound as exc:
        raise _Overtaken("a new key was removed while it was made; nothing relies on it.") from exc
    if records.parse_object(found, seal.KeySlot, name) != slot:
        raise Corrupt(f"{name} is not what was written a moment ago; nothing relies on it.")
    return identifier


# -- looking at the slots ------------------------------------------------------------------------


def slots(repository: Repository) -> list[Slot]:
    """Every slot, oldest first. Raises `Refused` for a repository that isn't encrypted."""
    passphrase = _keys_of(repository).passphrase
    return _slots(repository, _open_slots(repository.store, repository.format.id, passphrase))


def _slots(repository: Repository, opened: Sequence[_Opened]) -> list[Slot]:
    state = repository.state
    found = []
    for each in opened:
        if each.slot is None:
            found.append(Slot(each.id, is_damaged=True))
            continue
        epochs = frozenset(each.keys.epochs) if each.keys else None
        epoch = state.slots.get(each.id) or (1 if state.epoch == 1 else None)
        if epochs is not None:
            epoch = max(number for number in epochs if number <= state.epoch)
        is_removed = state.slots.get(each.id) == 0
        found.append(Slot(each.id, each.slot.created, each.slot.label, epochs, epoch, is_removed=is_removed))
    return sorted(found, key=lambda slot: (slot.created, slot.id))


def _keys_of(repository: Repository) -> Keys:
    if repository.keys is None:
        raise Refused(
            f"the repository at {repository.store.url} is not encrypted, so it has no keys; nothing was changed.",
            hint="`outlast init --encrypt` makes an encrypted one; `outlast copy` takes the snapshots there.",
        )
    return repository.keys


# -- changing them -------------------------------------------------------------------------------


def add(repository: Repository, passphrase: bytes, label: str = "") -> KeyChange:
    """Make a slot for another passphrase. One that opens only slots from before a rotation gets a new one.

    Raises `InvalidInput`, `Refused` when the passphrase is in use already, or `Busy`.
    """
    keys = _keys_of(repository)
    if not passphrase:
        raise InvalidInput("the new passphrase is empty; nothing was changed.")
    if len(label) > LABEL_CHARACTERS_MAX:
        raise InvalidInput(f"a label has at most {LABEL_CHARACTERS_MAX} characters; nothing was changed.")
    repository.log.refresh()

    def attempt() -> KeyChange:
        opened = _open_slots(repository.store, repository.format.id, passphrase)
        own = [each for each in opened if each.keys and repository.state.slots.get(each.id) != 0]
        for each in own:
            if each.keys and keys.epoch in each.keys.epochs:
                raise Refused(f"this passphrase opens the key {each.id[:8]} already; nothing was changed.")
        _refuse_too_many(opened)
        epoch = keys.epoch
        old = _superseded(opened, epoch)
        name = label or _label(own)
        slot = _write_slot(repository.store, _up_to(keys, epoch), passphrase, name, repository.clock)
        _commit(repository, "add", slot, name, epoch, old, lambda state: state.epoch == epoch)
        return KeyChange(slot, epoch, old)

    return _until_not_overtaken(attempt)


def rotate(repository: Repository) -> KeyChange:
    """Make a new data key, in use from now on, in a new slot for the passphrase that opened the repository.

    The slots of other passphrases can't be given the new key without those: they are `left_behind`.
    Raises `WrongKey` when the passphrase opens no slot any more, `Refused` or `Busy`.
    """
    keys = _keys_of(repository)
    passphrase = keys.passphrase
    repository.log.refresh()

    def attempt() -> KeyChange:
        base = repository.state.epoch
        opened = _open_slots(repository.store, repository.format.id, passphrase)
        own = [each for each in opened if each.keys and repository.state.slots.get(each.id) != 0]
        if not own:
            raise WrongKey("this passphrase opens no key of the repository; nothing was changed.")
        _refuse_too_many(opened)
        epoch, name = _reserve_epoch(repository), _label(own)
        wider = _up_to(keys, base)
        # In `keys` already before the commit, which begins to use it.
        wider.epochs[epoch] = keys.epochs[epoch] = repository.clock.random_bytes(seal.KEY_BYTES)
        slot = _write_slot(repository.store, wider, passphrase, name, repository.clock)
        old = _superseded(opened, epoch)

        def is_still_right(state: State) -> bool:
            """A passphrase that was taken away meanwhile must not come back with the new key."""
            return state.epoch == base and any(state.slots.get(each.id) != 0 for each in own)

        _commit(repository, "rotate", slot, name, epoch, old, is_still_right)
        others = [each for each in opened if each.keys is None]
        return KeyChange(slot, epoch, old, tuple(_slots(repository, others)))

    return _until_not_overtaken(attempt)


def remove(repository: Repository, reference: str) -> KeyChange:
    """Remove the slot whose id begins with `reference`: its passphrase opens the repository no more.

    Raises `NotFound`, `InvalidInput` when several fit, or `Refused` when no other slot is known to
    hold the newest data key.
    """
    keys = _keys_of(repository)
    repository.log.refresh()
    store = repository.store
    readable = {each.id: each.slot is not None for each in _read_slots(store)}
    missing = (slot for slot, epoch in repository.state.slots.items() if epoch)  # to tell that it is to be missing
    slot = _find(reference.strip().lower(), sorted({*readable, *missing}), store.url)

    def body(state: State) -> dict[str, Any]:
        others = (other for other, is_readable in readable.items() if is_readable and other != slot)
        if not any(_holds_newest(state, other) for other in others):
            raise Refused(
                f"no other key than {slot[:8]} is known to hold the newest data key: without it, nobody could read "
                "what is stored from now on. Nothing was changed.",
                hint="Make another one first: `outlast key add`.",
            )
        return {"action": "remove", "slot": slot, "epoch": state.slots.get(slot, 1)}

    if repository.state.slots.get(slot) != 0:
        repository.log.append(KEY, body)
    store.delete(f"keys/{slot}")
    return KeyChange(slot, keys.epoch)


def _holds_newest(state: State, slot: str) -> bool:
    """Whether the log tells, or it needs no telling, that a slot holds the data key in use."""
    known = state.slots.get(slot)
    return known != 0 and (state.epoch == 1 or known == state.epoch)


def _find(reference: str, every: Sequence[str], url: str) -> str:
    found = [each for each in every if each.startswith(reference)]
    hint = "`outlast key list` lists them."
    if len(reference) < _ID_CHARACTERS_MIN:
        raise InvalidInput(f"{reference!r} is too short; give at least {_ID_CHARACTERS_MIN} characters.", hint=hint)
    if not found:
        raise NotFound(f"no key of {url} has the id {reference!r}; nothing was changed.", hint=hint)
    if len(found) > 1:
        raise InvalidInput(f"{reference!r} fits {len(found)} keys; nothing was changed.", hint=hint)
    return found[0]


def _up_to(keys: Keys, epoch: int) -> Keys:
    """Without the data keys of rotations that came to nothing."""
    return msgspec.structs.replace(keys, epochs={each: key for each, key in keys.epochs.items() if each <= epoch})


def _reserve_epoch(repository: Repository) -> int:
    def body(state: State) -> dict[str, Any]:
        return {"action": "prepare", "epoch": state.epochs_given + 1}

    entry = repository.log.append(KEY, body)
    assert entry
    return int(entry.body["epoch"])


def _commit(
    repository: Repository,
    action: str,
    slot: str,
    label: str,
    epoch: int,
    replaces: Sequence[str],
    is_still_right: Callable[[State], bool],
) -> None:
    """Commit that a durable slot is in use, then delete those that it stands in for."""

    def body(state: State) -> dict[str, Any]:
        if not is_still_right(state) or state.slots.get(slot) == 0:
            raise _Overtaken(
                "the keys were changed by somebody else again and again; this change was not made.",
                hint="Run the same command again.",
            )
        return {"action": action, "slot": slot, "label": label, "epoch": epoch, "replaces": list(replaces)}

    try:
        repository.log.append(KEY, body)
    except _Overtaken:
        _delete(repository, slot)
        raise
    for old in replaces:
        _delete(repository, old)


def _delete(repository: Repository, slot: str) -> None:
    """Delete a slot that is of no more use. That it stays does no harm."""
    try:
        repository.store.delete(f"keys/{slot}")
    except OutlastError as exc:
        said = f"the key {slot[:8]}, which is replaced, could not be deleted: {exc.message}"
        repository.sink.event(Event("key.not_deleted", said, {"object": f"keys/{slot}"}))


def _until_not_overtaken(attempt: Callable[[], KeyChange]) -> KeyChange:
    for _ in range(_TRIES - 1):
        try:
            return attempt()
        except _Overtaken:
            continue
    return attempt()


def _superseded(opened: Sequence[_Opened], epoch: int) -> tuple[str, ...]:
    """The opened slots that hold no data key of `epoch` or later."""
    return tuple(each.id for each in opened if each.keys and max(each.keys.epochs) < epoch)


def _label(own: Sequence[_Opened]) -> str:
    return next((each.slot.label for each in own if each.slot and each.slot.label), "")


def _refuse_too_many(opened: Sequence[_Opened]) -> None:
    if len(opened) >= SLOTS_MAX:
        raise Refused(
            f"there are {SLOTS_MAX} keys already, and more are not looked at; nothing was changed.",
            hint="Remove one that is not needed: `outlast key list`, `outlast key remove ID`.",
        )
