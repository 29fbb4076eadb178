"""The history in words: each kind of entry says what it did, in the numbers that matter."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from outlast.records import LogEntry, PackRef, Snapshot
from outlast.repo.history import concerns, sentence
from outlast.repo.state import Condemned, State

PACKS = [PackRef(f"{number:064x}", 1000 * number, number) for number in range(1, 4)]
FIRST = Snapshot("a" * 32, "backup", "model", "2025-01-01T00:00:00.000000Z", files=5, bytes=900, bytes_added=70)
SECOND = msgspec.structs.replace(FIRST, id="b" * 32, name="other")


def entry(kind: str, **body: Any) -> LogEntry:
    plain = msgspec.to_builtins(body)
    return LogEntry(7, "00" * 16, "00" * 32, "2025-01-01T00:00:00.000000Z", "me@here", kind, plain)


def state() -> State:
    one, two, three = PACKS
    return State(
        6,
        "00" * 32,
        snapshots={FIRST.id: FIRST, SECOND.id: SECOND},
        packs={one.name: one},
        condemned={two.name: Condemned(two.name, two.bytes, two.chunks, 3)},
        quarantined={three.name: three},
    )


def told(kind: str, **body: Any) -> str:
    return sentence(entry(kind, **body), state(), lambda size: f"{size} B")


NEW = PackRef("f" * 64, 40, 1)
CASES = [
    (told("snapshot", snapshot=FIRST, packs=[NEW]), "backup aaaaaaaa of model: 5 files, 900 B, 70 B new"),
    (
        told("snapshot", snapshot=FIRST, packs=[NEW, PACKS[1]]),
        "backup aaaaaaaa of model: 5 files, 900 B, 70 B new, took back 1 pack, 2000 B, condemned before",
    ),
    (told("packs", packs=[NEW]), "stored 1 pack, 40 B, ahead of a snapshot"),
    (told("packs", packs=[PACKS[1]]), "took back 1 pack, 2000 B, condemned before"),
    (told("packs", packs=[PACKS[2]]), "took 1 pack, 3000 B out of quarantine"),
    (told("packs", packs=[PACKS[0]]), "listed packs that were live already"),
    (told("forget", snapshots=[FIRST.id]), "forgot 1 snapshot: aaaaaaaa of model"),
    (
        told("forget", snapshots=[f"{number}" * 32 for number in range(5)]),
        "forgot 5 snapshots: 00000000, 11111111, 22222222 and 2 more",
    ),
    (told("condemn", packs=[PACKS[0], NEW]), "condemned 2 packs, 1040 B"),
    (told("sweep", packs=[PACKS[1].name]), "deleted 1 pack, 2000 B"),
    (told("sweep", packs=[PACKS[1].name, PACKS[0].name]), "deleted 1 pack, 2000 B, of 2 packs listed"),
    (told("quarantine", packs=[PACKS[0].name], objects=[]), "quarantined 1 pack, 1000 B, damaged"),
    (told("quarantine", packs=[], objects=["index/ab"]), "quarantined 1 damaged object: index/ab"),
    (told("verified", packs=[PACKS[0].name]), "verified 1 pack, 1000 B: every stored byte was right"),
    (told("verified", packs=[], damaged=[PACKS[0].name]), f"found 1 pack damaged: {PACKS[0].name[:8]}"),
    (
        told("verified", packs=[PACKS[0].name], damaged=[PACKS[1].name]),
        f"verified 1 pack, 1000 B: every stored byte was right; found 1 pack damaged: {PACKS[1].name[:8]}",
    ),
    (told("key", action="add", slot="cd" * 16, label="ops", epoch=1), "key cdcdcdcd (ops) added"),
    (
        told("key", action="rotate", slot="cd" * 16, label="", epoch=2, replaces=["ef" * 16]),
        "keys rotated: data key 2 is in use from here on; key cdcdcdcd holds it, instead of efefefef",
    ),
    (told("key", action="remove", slot="cd" * 16, epoch=1), "key cdcdcdcd removed"),
    (told("key", action="prepare", epoch=2), "data key 2 reserved for a rotation"),
    (told("key", action="dance"), "a change of keys, 'dance', which this version does not know"),
    (told("alias", name="prod"), "an entry of kind 'alias', which this version does not know"),
]


@pytest.mark.parametrize(("said", "expected"), CASES, ids=[expected[:20] for _, expected in CASES])
def test_each_kind_of_entry_in_words(said: str, expected: str) -> None:
    assert said == expected


def test_which_names_an_entry_is_about() -> None:
    assert concerns(entry("snapshot", snapshot=FIRST, packs=[]), state()) == {"model"}
    assert concerns(entry("forget", snapshots=[FIRST.id, SECOND.id, "c" * 32]), state()) == {"model", "other"}
    assert concerns(entry("condemn", packs=[]), state()) == set()
