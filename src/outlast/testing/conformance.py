"""The contract of `outlast.store.base` as checks that anybody can run against his own store.

Every check is a function that gets a place of its own in the store and returns a remark (often
empty) or raises: `_ContractError` when the store does not keep its promise. The first line of its
docstring is the name that the user sees. A store that passes here can hold a repository.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import msgspec

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Corrupt, Exists, InvalidInput, NotFound, OutlastError
from outlast.store.base import ObjectStore

LISTED_OBJECTS = 1005
RACING_THREADS = 8
CLOCK_SKEW_SECONDS_MAX = 300
EPOCH_SANE_SECONDS = 1_000_000_000  # 2001: anything earlier is a clock that was never set


class CheckResult(msgspec.Struct, frozen=True):
    """One promise and whether the store kept it; `detail` says what was seen."""

    name: str
    passed: bool
    detail: str
    seconds: float


class _ContractError(Exception):
    """The store does not keep its promise; the text says what it did instead."""


class _Place:
    """The part of the store that one check may use."""

    def __init__(self, store: ObjectStore, prefix: str, clock: Clock) -> None:
        self.store = store
        self.prefix = prefix
        self.clock = clock

    def name(self, rest: str) -> str:
        return self.prefix + rest

    def names(self, below: str = "", after: str = "") -> list[str]:
        """What a listing gives, without the prefix of this place."""
        found = self.store.list(self.prefix + below, self.prefix + after if after else "")
        return [info.name.removeprefix(self.prefix) for info in found]

    def spread(self, call: Callable[[int], object], count: int) -> None:
        """Call with 0..count-1 from as many threads as the store likes."""
        with ThreadPoolExecutor(max(1, self.store.capabilities.concurrency)) as pool:
            for _ in pool.map(call, range(count)):
                pass


_Check = Callable[[_Place], str]


def check_store(store: ObjectStore, clock: Clock = SYSTEM_CLOCK, prefix: str = "") -> Iterator[CheckResult]:
    """Run every check, yielding each result as it is known, and remove everything that was made.

    `prefix` is where the checks write, "outlast-conformance-<random>/" when empty; nothing else is
    touched. Raises `InvalidInput` when something is there already, since it would be removed too.
    It moves about 60 MiB and takes some 1200 writes. A store that nothing can be written to is not
    tried any further: its own error is raised. Closing the iterator early cleans up.
    """
    if prefix and next(iter(store.list(prefix)), None) is not None:
        raise InvalidInput(
            f"There are objects below {prefix!r} already; nothing was touched.",
            hint="Leave the prefix out, or name one that is not in use.",
        )
    prefix = prefix or f"outlast-conformance-{clock.random_bytes(6).hex()}/"
    try:
        store.put_if_absent(f"{prefix}probe", [clock.random_bytes(16)])
        for number, check in enumerate(CHECKS):
            yield _run(check, _Place(store, f"{prefix}{number:02d}/", clock))
        yield _run(_check_removal, _Place(store, prefix, clock))
    finally:
        # After an early end; a store that is broken or refuses has had its say in the results.
        with suppress(Exception):
            _remove_all(store, prefix)


def _run(check: _Check, place: _Place) -> CheckResult:
    name = (check.__doc__ or check.__name__).splitlines()[0].rstrip(".")
    started = place.clock.monotonic_seconds()
    try:
        detail, passed = check(place), True
    except _ContractError as exc:
        detail, passed = str(exc), False
    except OutlastError as exc:
        detail, passed = exc.message, False
    except Exception as exc:  # noqa: BLE001  an error that isn't ours is a breach of the contract, whatever it is
        what = f": {exc}" if str(exc) else ""
        detail, passed = f"The store failed with an error that is none of the contract's{what}", False
    return CheckResult(name, passed, detail, place.clock.monotonic_seconds() - started)


def _remove_all(store: ObjectStore, prefix: str) -> None:
    for info in list(store.list(prefix)):
        store.delete(info.name)
    _remove_empty_folders(store, prefix)


def _remove_empty_folders(store: ObjectStore, prefix: str) -> None:
    """A local store keeps folders without objects; those below our own random prefix may go."""
    if store.capabilities.memory_map and prefix.endswith("/"):
        top: str = store.local_path(prefix[:-1])  # type: ignore[attr-defined]
        for folder, _, _ in os.walk(top, topdown=False):
            os.rmdir(folder)


def _expect(fact: bool, otherwise: str) -> None:
    if not fact:
        raise _ContractError(otherwise)


def _expect_error(kind: type[OutlastError], call: Callable[[], object], otherwise: str) -> None:
    try:
        call()
    except kind:
        return
    except OutlastError as exc:
        told, right = (each.kind.replace("_", " ") for each in (exc, kind))
        raise _ContractError(f"The store said {told!r} instead of {right!r}: {exc.message}") from exc
    raise _ContractError(otherwise)


def _check_second_create(place: _Place) -> str:
    """A second create of a name is refused and changes nothing."""
    name = place.name("object")
    place.store.put_if_absent(name, [b"first"])
    _expect_error(
        Exists,
        lambda: place.store.put_if_absent(name, [b"second"]),
        "The second create succeeded: two writers could both believe that they have committed.",
    )
    _expect(place.store.get(name) == b"first", "The refused create changed the object.")
    return ""


def _check_one_winner(place: _Place) -> str:
    """Of 8 threads creating the same name exactly one wins."""
    for attempt in range(5):
        name = place.name(f"race-{attempt}")

        def create(thread: int, name: str = name) -> int | None:
            try:
                place.store.put_if_absent(name, [b"thread ", str(thread).encode()])
            except Exists:
                return None
            return thread

        with ThreadPoolExecutor(RACING_THREADS) as pool:
            winners = [thread for thread in pool.map(create, range(RACING_THREADS)) if thread is not None]
        _expect(len(winners) == 1, f"{len(winners)} of {RACING_THREADS} threads were told that they won.")
        expected = f"thread {winners[0]}".encode()
        _expect(place.store.get(name) == expected, "The object is not the one that the winner wrote.")
    return ""


def _check_read_after_write(place: _Place) -> str:
    """What was written is read at once, whole, in ranges and by size."""
    for number in range(20):
        name, content = place.name(f"object-{number}"), f"content {number}".encode()
        place.store.put_if_absent(name, [content])
        _expect(place.store.get(name) == content, "The object read back is not the one written.")
        _expect(place.store.stat(name).size_bytes == len(content), "Its size is wrong.")
        _expect(place.store.get_ranges(name, [(2, 5)]) == [content[2:7]], "A range of it is wrong.")
    return ""


def _check_missing(place: _Place) -> str:
    """A name that was never written is not found."""
    name = place.name("absent")
    _expect_error(NotFound, lambda: place.store.get(name), "A read of nothing gave something.")
    _expect_error(NotFound, lambda: place.store.stat(name), "A missing object has a size.")
    _expect_error(NotFound, lambda: place.store.get_ranges(name, [(0, 1)]), "A range of nothing was read.")
    return ""


def _check_list_after_write(place: _Place) -> str:
    """A listing shows what was just written and no longer what was just deleted."""
    for number in range(10):
        place.store.put_if_absent(place.name(f"object-{number}"), [b"x"])
        _expect(f"object-{number}" in place.names(), "An object just written is missing from the listing.")
    place.store.delete(place.name("object-3"))
    _expect("object-3" not in place.names(), "An object just deleted is still listed.")
    _expect(len(place.names()) == 9, f"{len(place.names())} objects are listed instead of 9.")
    return ""


def _check_list_order(place: _Place) -> str:
    """A listing is in ascending order and honours prefix and `after`."""
    made = ["a-b", "a.b", "a/b", "a/c/d", "a0", "ab/c", "b", "B", "log/09", "log/10", "log/100"]
    for name in made:
        place.store.put_if_absent(place.name(name), [name.encode()])
    expected = sorted(made)
    _expect(place.names() == expected, f"The listing is {place.names()}, not {expected}.")
    for below in ("a", "a/", "a/c", "log/1", "log/10", "nothing", "b"):
        right = [name for name in expected if name.startswith(below)]
        _expect(place.names(below) == right, f"Below {below!r} it gives {place.names(below)}, not {right}.")
    for after in ("a-b", "a.c", "a/b", "log/09", "log/1", "z"):
        right = [name for name in expected if name > after]
        _expect(
            place.names("", after) == right,
            f"After {after!r} it gives {place.names('', after)}, not {right}.",
        )
    right = ["log/100"]
    _expect(place.names("log/", "log/10") == right, "Prefix and `after` together give something else.")
    sizes = {info.name: info.size_bytes for info in place.store.list(place.prefix)}
    _expect(all(sizes[place.name(name)] == len(name) for name in made), "A listed size is wrong.")
    return ""


def _check_long_list(place: _Place) -> str:
    """More than 1000 objects are all listed."""
    place.spread(lambda n: place.store.put_if_absent(place.name(f"{n:05d}"), [b""]), LISTED_OBJECTS)
    found, right = place.names(), [f"{n:05d}" for n in range(LISTED_OBJECTS)]
    _expect(found == right, f"{len(set(found) & set(right))} of {LISTED_OBJECTS} objects were listed.")
    tail = place.names("", right[-4])
    _expect(tail == right[-3:], f"Behind {right[-4]} the listing gives {tail}.")
    return ""


def _check_ranges(place: _Place) -> str:
    """Ranges are exact, in the order asked, and one past the end is refused."""
    content = bytes(range(256)) * 40
    name, end = place.name("object"), len(content)
    place.store.put_if_absent(name, [content])
    ranges = [(0, 1), (255, 2), (9000, 1240), (4096, 4096), (0, end), (10, 0), (end - 1, 1), (5, 3), (5, 3)]
    expected = [content[offset : offset + length] for offset, length in ranges]
    _expect(place.store.get_ranges(name, ranges) == expected, "The bytes of a range are wrong.")
    for offset, length in [(end - 1, 2), (end + 1000, 1), (0, 1 << 60)]:
        _expect_error(
            Corrupt,
            lambda asked=(offset, length): place.store.get_ranges(name, [(0, 1), asked]),  # type: ignore[misc]
            f"Bytes {offset} to {offset + length} of an object of {end} bytes were given without complaint.",
        )
    return ""


def _put_each(store: ObjectStore, name: str, versions: list[bytes]) -> None:
    for version in versions:
        store.put(name, [version])


def _check_overwrite(place: _Place) -> str:
    """A reader sees the old object or the new one, never a mixture."""
    name = place.name("object")
    versions = [bytes([65 + number]) * (100_000 + number) for number in range(12)]
    place.store.put(name, [versions[0]])
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(_put_each, place.store, name, versions[1:])
        reads = 0
        while not writing.done() or reads < 5:
            _expect(place.store.get(name) in versions, "A reader got neither the old nor the new object.")
            reads += 1
        writing.result()
    _expect(place.store.get(name) == versions[-1], "The last version written is not the one read.")
    _expect(place.store.stat(name).size_bytes == len(versions[-1]), "The size is that of an older version.")
    return ""


def _check_delete(place: _Place) -> str:
    """A deleted object is gone, deleting a missing one is no error, and the name can be used again."""
    name = place.name("object")
    place.store.delete(name)
    place.store.put_if_absent(name, [b"one"])
    place.store.delete(name)
    _expect_error(NotFound, lambda: place.store.get(name), "A deleted object was read.")
    place.store.delete(name)
    place.store.put_if_absent(name, [b"two"])
    _expect(place.store.get(name) == b"two", "The name gave the old object after it was written anew.")
    return ""


def _check_empty(place: _Place) -> str:
    """An empty object exists and is empty."""
    for name, parts in [(place.name("none"), []), (place.name("blank"), [b"", b""])]:
        place.store.put_if_absent(name, parts)
        _expect(place.store.get(name) == b"", "It is not empty.")
        _expect(place.store.stat(name).size_bytes == 0, "Its size is not 0.")
        _expect(place.store.get_ranges(name, [(0, 0)]) == [b""], "An empty range of it is not empty.")
        _expect_error(Exists, lambda n=name: place.store.put_if_absent(n, [b"x"]), "It counted as absent.")  # type: ignore[misc]
    return ""


def _check_big(place: _Place) -> str:
    """An object of 9 MiB and a bit comes back bit for bit."""
    content = place.clock.random_bytes(1 << 16) * 144 + b"and a bit"
    place.store.put_if_absent(place.name("created"), [content])
    _expect(place.store.get(place.name("created")) == content, "What create wrote came back different.")
    place.store.put(place.name("put"), [memoryview(content)[:7], memoryview(content)[7:]])
    _expect(place.store.get(place.name("put")) == content, "What put wrote came back different.")
    ranges = [(1, 1 << 20), (5 << 20, 4 << 20), (len(content) - 9, 9)]
    expected = [content[offset : offset + length] for offset, length in ranges]
    _expect(place.store.get_ranges(place.name("put"), ranges) == expected, "A range of it is wrong.")
    _expect_error(
        Exists,
        lambda: place.store.put_if_absent(place.name("created"), [content[:-1], b"!"]),
        "An object that differs in its last byte only was taken for the same.",
    )
    return ""


def _check_many_parts(place: _Place) -> str:
    """Ten thousand parts of every kind of buffer are joined in order."""
    kinds: list[Callable[[bytes], bytes | bytearray | memoryview]] = [bytes, bytearray, memoryview]
    parts = [kinds[n % 3](n.to_bytes(4, "big") * (n % 100)) for n in range(10_000)]
    name = place.name("object")
    place.store.put_if_absent(name, parts)
    _expect(place.store.get(name) == b"".join(parts), "The parts came back in another order or number.")
    return ""


def _check_names(place: _Place) -> str:
    """Names that could leave the store or hide in it are refused."""
    for bad in [
        "",
        "/etc/x",
        "../x",
        "a/../x",
        "a/./x",
        "a//x",
        "a/",
        ".hidden",
        "a/.x",
        "a\0b",
        "a b",
        "é",
        "x" * 600,
    ]:
        for call in (
            lambda name: place.store.put_if_absent(name, [b"x"]),
            lambda name: place.store.put(name, [b"x"]),
            place.store.get,
            place.store.stat,
            place.store.delete,
            lambda name: place.store.get_ranges(name, [(0, 1)]),
        ):
            _expect_error(InvalidInput, lambda c=call, n=bad: c(n), f"The name {bad[:20]!r} was accepted.")  # type: ignore[misc]
    long_name = place.name("/".join(["long"] * 60))
    place.store.put_if_absent(long_name, [b"x"])
    _expect(place.store.get(long_name) == b"x", "A long legal name gave another object.")
    return ""


def _check_modified(place: _Place) -> str:
    """Modification times are set by the store, agree with the listing and never go back."""
    name = place.name("object")
    place.store.put(name, [b"one"])
    first = place.store.stat(name).modified_seconds
    listed = next((info.modified_seconds for info in place.store.list(name)), 0.0)
    place.store.put(name, [b"two"])
    second = place.store.stat(name).modified_seconds
    _expect(first > EPOCH_SANE_SECONDS, f"The time {first:.0f} is not one of this century.")
    _expect(abs(listed - first) < 1.5, f"The listing says {listed:.0f}, the object itself {first:.0f}.")
    _expect(second >= first - 1, "A later write has an earlier time.")
    skew_seconds = second - place.clock.now_ns() / 1e9
    if abs(skew_seconds) > CLOCK_SKEW_SECONDS_MAX:
        way = "ahead of" if skew_seconds > 0 else "behind"
        return f"warning: the store's clock is {abs(skew_seconds):.0f} s {way} this machine's; one is wrong."
    return ""


def _check_removal(place: _Place) -> str:
    """Everything these checks made is removed again."""
    _remove_all(place.store, place.prefix)
    left = place.names()
    _expect(not left, f"{len(left)} objects are still listed below {place.prefix}.")
    return ""


CHECKS: tuple[_Check, ...] = (
    _check_second_create,
    _check_one_winner,
    _check_read_after_write,
    _check_missing,
    _check_list_after_write,
    _check_list_order,
    _check_long_list,
    _check_ranges,
    _check_overwrite,
    _check_delete,
    _check_empty,
    _check_big,
    _check_many_parts,
    _check_names,
    _check_modified,
)
