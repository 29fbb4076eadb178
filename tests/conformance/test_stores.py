"""Every store keeps the contract; and a store that breaks it is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from outlast.clock import SYSTEM_CLOCK, ManualClock
from outlast.errors import Exists, InvalidInput, NotFound, Refused
from outlast.store.base import Buffer, ObjectInfo, ObjectStore
from outlast.store.cloud import CloudStore
from outlast.store.layers import QuotaStore, ReadOnlyStore, RetryStore, ThrottledStore, open_store
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore
from outlast.testing.conformance import check_store
from servers import LossyProxy


def failures(store: ObjectStore) -> dict[str, str]:
    return {result.name: result.detail for result in check_store(store) if not result.passed}


def assert_conforms(store: ObjectStore) -> None:
    results = list(check_store(store))
    assert {result.name: result.detail for result in results if not result.passed} == {}
    assert len(results) == 16
    assert list(store.list("")) == [], "the checks left something behind"


def test_a_directory(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet" / "there"
    assert_conforms(LocalStore(str(root)))
    assert [path.name for path in root.rglob("*")] == ["tmp"], "folders or temporary files were left"


def test_a_directory_through_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.store.local._set_direct", lambda fd, direct: False)
    assert_conforms(LocalStore(str(tmp_path)))


def test_a_directory_without_hard_links(tmp_path: Path) -> None:
    from outlast.store.disk import Disk

    class NoLinks(Disk):
        def link(self, source: str, target: str) -> None:
            raise PermissionError(1, "Operation not permitted", target)

    assert_conforms(LocalStore(str(tmp_path), disk=NoLinks()))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_memory() -> None:
    assert_conforms(MemoryStore())


@pytest.mark.server
def test_s3(s3: str) -> None:
    assert_conforms(open_store(f"{s3}/some/prefix"))


@pytest.mark.server
def test_s3_without_prefix_and_without_retries(s3: str) -> None:
    assert_conforms(CloudStore(s3))


@pytest.mark.server
def test_s3_that_loses_replies(lossy_s3: tuple[str, LossyProxy]) -> None:
    url, proxy = lossy_s3
    store = open_store(url)
    lost = 0
    for number, result in enumerate(results := check_store(store)):
        assert result.passed, result
        lost += proxy.lost
        proxy.lost = 0
        if number == 5:
            break
        proxy.lose_replies("PUT", 2)
    results.close()  # type: ignore[attr-defined]
    assert lost == 8, "the check that writes nothing loses nothing"


@pytest.mark.parametrize(
    "wrap",
    [
        RetryStore,
        lambda store: ThrottledStore(store, 1e12),
        lambda store: QuotaStore(store, 1 << 30),
        lambda store: RetryStore(ThrottledStore(QuotaStore(store, 1 << 30), 1e12)),
    ],
    ids=["retry", "throttle", "quota", "all"],
)
@pytest.mark.parametrize("kind", ["local", "memory"])
def test_layers(wrap: Callable[[ObjectStore], ObjectStore], kind: str, tmp_path: Path) -> None:
    assert_conforms(wrap(LocalStore(str(tmp_path)) if kind == "local" else MemoryStore()))


def test_a_store_that_nothing_can_be_written_to_is_one_error_and_not_fifteen() -> None:
    with pytest.raises(Refused, match="opened for reading only"):
        next(check_store(ReadOnlyStore(MemoryStore())))


def test_a_wrong_clock_is_a_warning() -> None:
    clock = ManualClock(now_ns=SYSTEM_CLOCK.now_ns() + 3600 * 10**9)
    results = {result.name: result for result in check_store(MemoryStore(clock=clock))}
    result = results["Modification times are set by the store, agree with the listing and never go back"]
    assert result.passed
    assert "3600 s ahead" in result.detail


def test_an_early_end_cleans_up() -> None:
    store = MemoryStore()
    results = check_store(store)
    next(results)
    assert list(store.list("")) != []
    results.close()  # type: ignore[attr-defined]
    assert list(store.list("")) == []


def test_a_prefix_in_use_is_left_alone() -> None:
    store = MemoryStore()
    store.put("packs/aa", [b"precious"])
    with pytest.raises(InvalidInput):
        next(check_store(store, prefix="packs/"))
    assert store.get("packs/aa") == b"precious"
    assert all(result.passed for result in check_store(store, prefix="checks/"))
    assert [info.name for info in store.list("")] == ["packs/aa"]


class ForgetsThatItExists(MemoryStore):
    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self.put(name, parts)


class ChecksThenWrites(MemoryStore):
    """The classic race: look, wait a moment, write."""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        try:
            self.stat(name)
        except NotFound:
            SYSTEM_CLOCK.sleep(0.01 if "race" in name else 0)
            self.put(name, parts)
        else:
            raise Exists(name)


class StaleList(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.newest = ""

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        super().put_if_absent(name, parts)
        self.newest = name

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return (info for info in super().list(prefix, after) if info.name != self.newest)


class FirstPageOnly(MemoryStore):
    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return iter(list(super().list(prefix, after))[:1000])


class UnorderedList(MemoryStore):
    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return reversed(list(super().list(prefix, after)))


class FolderPrefixes(MemoryStore):
    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        folder = prefix if prefix.endswith("/") else prefix + "/"
        return super().list(folder, after)


class ShortRange(MemoryStore):
    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        content = self.get(name)
        return [content[offset : offset + length] for offset, length in ranges]


class FlipsABit(MemoryStore):
    def get(self, name: str) -> bytes:
        content = super().get(name)
        if len(content) < 1 << 20:
            return content
        middle = len(content) // 2
        return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


class TornOverwrite(MemoryStore):
    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        super().put(name, [content[: len(content) // 2]])
        SYSTEM_CLOCK.sleep(0.002)
        super().put(name, [content])


class DeleteDoesNothing(MemoryStore):
    def delete(self, name: str) -> None:
        return


class LosesEmptyObjects(MemoryStore):
    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        if b"".join(parts):
            super().put_if_absent(name, parts)


class TakesAnyName(LocalStore):
    def local_path(self, name: str) -> str:
        return f"{self._root}/{name}"


class NoClock(MemoryStore):
    def stat(self, name: str) -> ObjectInfo:
        return ObjectInfo(name, super().stat(name).size_bytes, 0.0)


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (ForgetsThatItExists, "A second create of a name is refused and changes nothing"),
        (ChecksThenWrites, "Of 8 threads creating the same name exactly one wins"),
        (StaleList, "A listing shows what was just written and no longer what was just deleted"),
        (FirstPageOnly, "More than 1000 objects are all listed"),
        (UnorderedList, "A listing is in ascending order and honours prefix and `after`"),
        (FolderPrefixes, "A listing is in ascending order and honours prefix and `after`"),
        (ShortRange, "Ranges are exact, in the order asked, and one past the end is refused"),
        (FlipsABit, "An object of 9 MiB and a bit comes back bit for bit"),
        (TornOverwrite, "A reader sees the old object or the new one, never a mixture"),
        (
            DeleteDoesNothing,
            "A deleted object is gone, deleting a missing one is no error, and the name can be used again",
        ),
        (DeleteDoesNothing, "Everything these checks made is removed again"),
        (LosesEmptyObjects, "An empty object exists and is empty"),
        (NoClock, "Modification times are set by the store, agree with the listing and never go back"),
    ],
)
def test_a_broken_store_is_found_out(broken: type[MemoryStore], promise: str) -> None:
    assert promise in failures(broken())


def test_a_store_that_takes_any_name_is_found_out(tmp_path: Path) -> None:
    store = TakesAnyName(str(tmp_path / "deep" / "store"))
    assert "Names that could leave the store or hide in it are refused" in failures(store)


def test_a_foreign_error_is_found_out() -> None:
    class LeaksItsVendor(MemoryStore):
        def get(self, name: str) -> bytes:
            try:
                return super().get(name)
            except NotFound:
                raise KeyError(name) from None

    assert "none of the contract's" in failures(LeaksItsVendor())["A name that was never written is not found"]


def test_a_store_that_refuses_everything_fails_without_a_traceback() -> None:
    class Closed(MemoryStore):
        def put(self, name: str, parts: Sequence[Buffer]) -> None:
            raise Refused("no")

        def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
            if not name.endswith("probe"):
                raise Refused("no")
            super().put_if_absent(name, parts)

    assert len(failures(Closed())) == 14
