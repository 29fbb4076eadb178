"""The commands that tell about a repository: repo stats, repo log, repo verify-log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from outlast.cli.command import CORRUPT, Call, Command, Group
from outlast.cli.text import count_text, path_shown, printable, shape_text, short_id, size_text, table, time_text
from outlast.errors import Corrupt, InvalidInput, NotFound

if TYPE_CHECKING:
    from outlast.records import Snapshot
    from outlast.repo.chain import Walk
    from outlast.repo.repository import Repository
    from outlast.repo.stats import NameStats, Objects, Stats, TensorStats

_CODES = (10, 12, 20, 21)
_ENTRY = re.compile(r"log/([0-9]{20})")
_EXPECTED = re.compile(r"([0-9]{1,20}):([0-9a-f]{64})")


@click.group(cls=Group)
def repo() -> None:
    """What a repository holds, what happened to it, and the proof that its history is whole.

    Exit codes: 0 done; 1 failed; 2 wrong usage; 10 no repository; 12 wrong key; 20 corrupt; 21 refused; 130 cancelled.
    """


# -- stats ---------------------------------------------------------------------------------------


@repo.command(cls=Command, codes=_CODES)
@click.option("--name", metavar="NAME", help="Of the names only this one; it is still compared with the others.")
@click.option("--tensors", is_flag=True, help="Tell of each tensor of the newest snapshot too.")
def stats(call: Call, name: str | None, tensors: bool) -> int:
    """Show sizes, and what deduplication and compression save.

    OWN is what no other name needs, SHARED what others need too; both count each chunk once, as plain
    bytes. STORED is what is stored for UNIQUE.
    """
    import msgspec

    from outlast.repo import stats as counting

    repository = call.readable_repository()
    names = sorted({each.name for each in repository.snapshots()})
    if name is not None:
        repository.find_snapshot("latest", name)  # raises where there is none of that name
    elif tensors and len(names) > 1:
        raise InvalidInput(
            f"there are snapshots of {len(names):,} names, and --tensors is about one.",
            hint=f"Add --name: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}.",
        )
    found = counting.stats(repository)
    if name is not None:
        found.names = [each for each in found.names if each.name == name]
    document = msgspec.to_builtins(found)
    lines = list(_stats_lines(found))
    if tensors and names:
        newest = repository.find_snapshot("latest", name)
        rows = _tensors(repository, newest, found.problems)
        count = sum(each.name == newest.name for each in repository.snapshots())
        document |= {"tensors_of": newest.id, "tensors": msgspec.to_builtins(rows), "problems": found.problems}
        lines += _tensor_lines(rows, newest, count)
    lines += [f"Not counted: {printable(problem)}" for problem in found.problems]
    call.result(document, lines, always=True)
    return CORRUPT if found.problems or call.warnings else 0


def _tensors(repository: Repository, snapshot: Snapshot, problems: list[str]) -> list[TensorStats]:
    from outlast.backup import inspect
    from outlast.repo.stats import tensor_stats

    views = list(inspect.show(repository, snapshot, lambda entry: entry.type == "file"))
    problems += [f"{path_shown(view.entry.path)} is damaged: {view.problem}" for view in views if view.problem]
    try:
        models = ((view.entry, view.tensors) for view in views if view.tensors)
        return tensor_stats(repository, snapshot.name, models)
    except Corrupt as exc:
        problems.append(f"the tensors are not compared: {exc.message}")
        return []


def _stats_lines(found: Stats) -> Iterator[str]:
    yield (
        f"{count_text(found.snapshots, 'snapshot')} of {size_text(found.bytes)} in all. Each chunk once: "
        f"{size_text(found.bytes_unique)} (dedup {_times(found.dedup_ratio)}), stored in "
        f"{size_text(found.bytes_stored)} (compression {_times(found.compression_ratio)})."
    )
    yield f"Manifests: {size_text(found.manifest_bytes)}, stored in {size_text(found.manifest_bytes_stored)}."
    yield ""
    yield from table(("OBJECTS", "COUNT", "BYTES"), _place_rows(found), right="COUNT BYTES")
    if found.names:
        yield ""
        heading = ("NAME", "SNAPSHOTS", "SIZE", "UNIQUE", "OWN", "SHARED", "STORED", "DEDUP", "COMPRESSION")
        yield from table(heading, map(_name_row, found.names), right=" ".join(heading[1:]))


def _place_rows(found: Stats) -> Iterator[tuple[str, str, str]]:
    places = found.places
    rows: list[tuple[str, Objects, bool]] = [
        ("packs", places.live, True),
        ("packs condemned", places.condemned, False),
        ("packs quarantined", places.quarantined, False),
        ("packs in no entry", places.unreferenced, False),
        ("log", places.log, True),
        ("index (derived)", places.index, True),
        ("states (derived)", places.states, True),
    ]
    for what, place, always in rows:
        if place.objects or always:
            yield what, f"{place.objects:,}", size_text(place.bytes)
    yield "all", f"{sum(each.objects for _, each, _ in rows):,}", size_text(sum(each.bytes for _, each, _ in rows))


def _name_row(each: NameStats) -> tuple[str, ...]:
    sizes = (each.bytes, each.bytes_unique, each.bytes_own, each.bytes_shared, each.bytes_stored)
    ratios = (_times(each.dedup_ratio), _times(each.compression_ratio))
    return printable(each.name), f"{each.snapshots:,}", *map(size_text, sizes), *ratios


def _tensor_lines(rows: Sequence[TensorStats], newest: Snapshot, count: int) -> Iterator[str]:
    yield ""
    if not rows:
        yield f"Snapshot {short_id(newest.id)} has no tensors."
        return
    of = f"{short_id(newest.id)} of {printable(newest.name)}"
    yield f"Tensors of snapshot {of}, and how many of its {count_text(count, 'snapshot')} hold each one whole:"
    heading = ("TENSOR", "DTYPE", "SHAPE", "BYTES", "STORED", "COMPRESSION", "SNAPSHOTS")
    many = len({each.path for each in rows}) > 1
    yield from table(
        heading,
        (
            (
                (f"{path_shown(each.path)}: " if many else "") + printable(each.name),
                each.dtype,
                shape_text(each.shape),
                size_text(each.bytes),
                size_text(each.bytes_stored),
                _times(each.compression_ratio),
                f"{each.snapshots:,}",
            )
            for each in rows
        ),
        right=" ".join(heading[3:]),
    )


def _times(ratio: float | None) -> str:
    """
    >>> _times(1.2345), _times(120.4), _times(None)
    ('1.23x', '120x', '-')
    """
    if ratio is None:
        return "-"
    return f"{ratio:,.0f}x" if ratio >= 99.995 else f"{ratio:.2f}x"


# -- log -----------------------------------------------------------------------------------------


@repo.command(cls=Command, codes=_CODES)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the newest N of what is asked for.")
@click.option("--name", metavar="NAME", help="Only what made or forgot snapshots of this name.")
@click.option("--kind", metavar="KIND", help="Only entries of this kind, such as snapshot, forget, condemn or key.")
def log(call: Call, limit: int | None, name: str | None, kind: str | None) -> int:
    """Tell the history in words, newest last.

    Entries that are damaged or missing are named in their place, whatever is asked for.
    """
    from outlast.repo.state import KINDS

    if kind is not None and kind not in KINDS:
        raise InvalidInput(
            f"there is no kind of entry {kind!r}; nothing was read.", hint=f"Known are {', '.join(KINDS)}."
        )
    told = list(_history(call.connected(), name, kind))
    is_damaged = any("damaged" in row for row in told)
    shown = told[-limit:] if limit else told
    call.printer.result(shown, _log_lines(shown), always=True)
    return CORRUPT if is_damaged else 0


def _history(repository: Repository, name: str | None, kind: str | None) -> Iterator[dict[str, Any]]:
    from outlast.repo import chain, history, seal
    from outlast.repo.state import State

    damaged = {_seq(each.object): each for each in chain.walk(repository.store, repository.log).damage}
    damaged.pop(None, None)  # states: they are no part of the history
    sound = {_seq(info.name) for info in repository.store.list("log/")} - damaged.keys() - {None}
    contents = repository.log.read_many(sorted(seq for seq in sound if seq))
    state = State(0, repository.log.anchor)
    for seq in sorted(seq for seq in {*sound, *damaged} if seq is not None):
        if seq in damaged:
            yield {"seq": seq, "object": damaged[seq].object, "damaged": damaged[seq].problem}
            continue
        data = next(contents)
        if data is None:
            yield {"seq": seq, "damaged": "it went away while it was read."}
            continue
        entry = repository.log.parse(data, seq)
        if (kind is None or entry.kind == kind) and (name is None or name in history.concerns(entry, state)):
            yield {
                "seq": seq,
                "time": entry.time,
                "actor": entry.actor,
                "kind": entry.kind,
                "what": history.sentence(entry, state, size_text),
            }
        state.apply(entry, seal.digest(data).hex())


def _seq(name: str) -> int | None:
    """The number of an entry by its object; 0 for `format`, which the first one chains to."""
    if name == "format":
        return 0
    found = _ENTRY.fullmatch(name)
    return int(found[1]) or None if found else None


def _log_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not rows:
        yield "No entries."
        return
    yield from table(
        ("ENTRY", "TIME (UTC)", "BY", "WHAT"),
        (
            (str(row["seq"]), "", "", f"damaged: {printable(row['damaged'])}")
            if "damaged" in row
            else (
                str(row["seq"]),
                printable(time_text(row["time"])),
                printable(row["actor"]),
                printable(row["what"]),
            )
            for row in rows
        ),
        right="ENTRY",
    )


# -- verify-log ----------------------------------------------------------------------------------


@repo.command("verify-log", cls=Command, codes=_CODES)
@click.option("--expect", metavar="SEQ:HASH", help="Prove that this entry, a head written down before, is still there.")
def verify_log(call: Call, expect: str | None) -> int:
    """Prove that the history is whole, and print its head.

    Every entry, the chain of hashes from `format` to the newest one, and every state are verified.
    Whoever keeps the head elsewhere can tell later, by --expect, a store that serves an older state.
    """
    from outlast.repo import chain

    expected = _expectation(expect)
    repository = call.connected()
    states = sum(1 for _ in repository.store.list("state/"))
    found = chain.walk(repository.store, repository.log)
    problem = _broken_expectation(repository, found, *expected) if expected else ""
    is_whole = not found.damage
    head = {"seq": found.state.seq, "hash": found.state.head_hash} if is_whole else None
    document = {
        "ok": is_whole and not problem,
        "head": head,
        "states": states,
        "damaged": [{"object": each.object, "problem": each.problem} for each in found.damage],
        "expected": {"seq": expected[0], "hash": expected[1], "problem": problem} if expected else None,
    }
    call.printer.result(document, _chain_lines(found, states, expected, problem), always=True)
    return 0 if document["ok"] else CORRUPT


def _expectation(expect: str | None) -> tuple[int, str] | None:
    if expect is None:
        return None
    parts = _EXPECTED.fullmatch(expect.strip().lower())
    if not parts or not int(parts[1]):
        raise InvalidInput(
            f"--expect {expect!r} is not of the form SEQ:HASH; nothing was verified.",
            hint="Give the head as `outlast repo verify-log` printed it: the number, a colon, 64 hexadecimal digits.",
        )
    return int(parts[1]), parts[2]


def _broken_expectation(repository: Repository, found: Walk, seq: int, expected: str) -> str:
    """Why the entry that should be there isn't, or ""."""
    from outlast.repo import seal
    from outlast.repo.log import entry_name

    try:
        data = repository.store.get(entry_name(seq))
    except NotFound:
        newest = f"the newest one is {found.state.seq}" if found.state.seq < seq else "later ones exist"
        return (
            f"entry {seq} is not there, {newest}: this is not the whole history. Part of it was lost, or is withheld."
        )
    if seal.digest(data).hex() != expected:
        return f"entry {seq} is another one than was expected: this is not the history that it was."
    return ""


def _chain_lines(found: Walk, states: int, expected: tuple[int, str] | None, problem: str) -> Iterator[str]:
    for each in found.damage:
        yield f"{each.object}: {printable(each.problem)}"
    if problem:
        yield f"Not as expected: {problem}"
    if found.damage:
        yield f"{count_text(len(found.damage), 'object')} damaged. `outlast check` tells which snapshots need them."
        return
    also = f", and so {'is' if states == 1 else 'are'} {count_text(states, 'state')}" if states else ""
    yield f"The chain is whole from `format` to the newest of {_entries(found.state.seq)}{also}."
    if expected and not problem:
        yield f"Entry {expected[0]} is the expected one: everything up to it is as it was then."
    if found.state.seq and not problem:
        yield f"Head: {found.state.seq}:{found.state.head_hash}"


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count:,} entries"
