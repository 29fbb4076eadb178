"""What the layers add, and which store a URL opens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from outlast.clock import ManualClock
from outlast.errors import Exists, InvalidInput, NotFound, Refused, StoreFull, Unavailable
from outlast.store.base import Buffer, ObjectInfo
from outlast.store.layers import QuotaStore, ReadOnlyStore, RetryStore, ThrottledStore, open_store
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore


class Flaky(MemoryStore):
    """Fails the next `failures` calls; with `applies`, a failing write has happened all the same."""

    def __init__(self, failures: int, applies: bool = False) -> None:
        super().__init__()
        self.failures = failures
        self.applies = applies
        self.calls = 0

    def _maybe_fail(self) -> None:
        self.calls += 1
        if self.failures:
            self.failures -= 1
            raise Unavailable("The line is down.")

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        if self.applies:
            super().put_if_absent(name, parts)
        self._maybe_fail()
        if not self.applies:
            super().put_if_absent(name, parts)

    def get(self, name: str) -> bytes:
        self._maybe_fail()
        return super().get(name)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        for number, info in enumerate(super().list(prefix, after)):
            if number == 2:
                self._maybe_fail()
            yield info


def test_retries_wait_longer_each_time_and_then_succeed() -> None:
    clock = ManualClock(seed=1)
    store = RetryStore(Flaky(4), attempts=5, base_seconds=1.0, clock=clock)
    store.put_if_absent("object", [b"x"])
    assert store.get("object") == b"x"
    assert 0 < clock.monotonic_seconds() < 1 + 2 + 4 + 8


def test_retries_end() -> None:
    flaky = Flaky(100)
    with pytest.raises(Unavailable, match="line is down"):
        RetryStore(flaky, attempts=3, clock=ManualClock()).get("object")
    assert flaky.calls == 3


def test_what_retrying_cannot_change_is_not_retried() -> None:
    clock = ManualClock()
    store = RetryStore(QuotaStore(MemoryStore(), 1), clock=clock)
    with pytest.raises(StoreFull):
        store.put("object", [b"xx"])
    with pytest.raises(NotFound):
        store.get("object")
    assert clock.monotonic_seconds() == 0


def test_our_own_success_is_not_reported_as_exists() -> None:
    store = RetryStore(Flaky(1, applies=True), clock=ManualClock())
    store.put_if_absent("log/1", [b"our ", b"entry"])
    assert store.get("log/1") == b"our entry"


def test_a_success_before_the_last_lost_reply_counts() -> None:
    flaky = Flaky(1, applies=True)
    RetryStore(flaky, attempts=1, clock=ManualClock()).put_if_absent("log/1", [b"entry"])
    assert flaky.get("log/1") == b"entry"


def test_somebody_elses_success_is_exists_even_after_a_failure() -> None:
    flaky = Flaky(0)
    flaky.put_if_absent("log/1", [b"theirs"])
    flaky.failures = 1
    with pytest.raises(Exists):
        RetryStore(flaky, clock=ManualClock()).put_if_absent("log/1", [b"ours"])


def test_identical_bytes_of_another_are_exists_when_nothing_failed() -> None:
    flaky = Flaky(0)
    flaky.put_if_absent("log/1", [b"same"])
    with pytest.raises(Exists):
        RetryStore(flaky, clock=ManualClock()).put_if_absent("log/1", [b"same"])


def test_a_broken_listing_goes_on_where_it_broke() -> None:
    flaky = Flaky(0)
    for number in range(9):
        flaky.put_if_absent(f"object-{number}", [b"x"])
    flaky.failures = 3
    names = [info.name for info in RetryStore(flaky, clock=ManualClock()).list("object-")]
    assert names == [f"object-{number}" for number in range(9)]


def test_throttle_keeps_the_rate_in_both_directions() -> None:
    clock = ManualClock()
    store = ThrottledStore(MemoryStore(), bytes_per_second=1000, clock=clock)
    store.put("object", [b"x" * 2000])
    assert clock.monotonic_seconds() == pytest.approx(2)
    store.get("object")
    store.get_ranges("object", [(0, 500), (0, 500)])
    assert clock.monotonic_seconds() == pytest.approx(5)
    clock.sleep(100)
    store.put("object", [b"x" * 1000])
    assert clock.monotonic_seconds() == pytest.approx(106), "idle time is not saved up for a burst"


def test_throttle_hides_the_local_file(tmp_path: Path) -> None:
    store = ThrottledStore(LocalStore(str(tmp_path)), 1000)
    assert not store.capabilities.memory_map
    with pytest.raises(Refused):
        store.local_path("object")


def test_read_only_reads_and_refuses_every_change(tmp_path: Path) -> None:
    below = LocalStore(str(tmp_path))
    below.put("object", [b"x"])
    store = ReadOnlyStore(below)
    assert store.get("object") == b"x"
    assert store.capabilities.readonly
    assert Path(store.local_path("object")).read_bytes() == b"x"
    for call in (
        lambda: store.put("object", [b"y"]),
        lambda: store.put_if_absent("new", [b"y"]),
        lambda: store.delete("object"),
    ):
        with pytest.raises(Refused):
            call()
    assert [(info.name, below.get(info.name)) for info in below.list("")] == [("object", b"x")]


def test_quota_is_exact_and_room_can_be_made() -> None:
    store = QuotaStore(MemoryStore(), 10)
    store.put_if_absent("a", [b"12345", b"678"])
    with pytest.raises(StoreFull, match="8 of 10"):
        store.put_if_absent("b", [b"123"])
    with pytest.raises(Exists):
        store.put_if_absent("a", [b"12"])
    store.put_if_absent("b", [b"12"])
    store.delete("a")
    store.put("b", [b"12345"])
    store.put_if_absent("c", [b"12345"])
    with pytest.raises(StoreFull):
        store.put_if_absent("d", [b"1"])
    store.budget_bytes = 11
    store.put_if_absent("d", [b"1"])


def test_urls_open_the_right_store(tmp_path: Path) -> None:
    for url in (str(tmp_path / "a b"), f"file://{tmp_path}/a%20b", f"file://localhost{tmp_path}/a%20b"):
        store = open_store(url)
        store.put("object", [url.encode()])
        assert (tmp_path / "a b" / "object").read_bytes() == url.encode()
    assert open_store(str(tmp_path)).url == str(tmp_path)
    open_store("memory://one").put("object", [b"x"])
    assert open_store("memory://one").get("object") == b"x"
    assert list(open_store("memory://two").list("")) == []


@pytest.mark.parametrize(
    "url",
    ["", "s3:/bucket", "s3:bucket", "ftp://host/x", "http://host", "file://elsewhere/x", "file:relative", "s3://"],
)
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput):
        open_store(url)


def test_an_unknown_scheme_names_the_known_ones() -> None:
    with pytest.raises(InvalidInput) as caught:
        open_store("ftp://host/x")
    assert all(scheme in caught.value.hint for scheme in ("file://", "s3://", "gs://", "az://", "memory://"))


def test_opening_a_local_store_does_not_load_the_cloud() -> None:
    program = "import sys, outlast.store.layers as l; l.open_store('/x'); print('obstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
