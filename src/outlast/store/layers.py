"""Stores around stores: each keeps the contract of `base` and changes one thing. And `open_store`."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import msgspec

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Exists, InvalidInput, NotFound, OutlastError, Refused, StoreFull, Unavailable
from outlast.store.base import Buffer, Capabilities, ObjectInfo, ObjectStore
from outlast.store.local import LocalStore
from outlast.store.memory import MemoryStore

RETRY_SECONDS_MAX = 30.0

T = TypeVar("T")


class Layer:
    """What a layer does not change."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @property
    def url(self) -> str:
        return self._store.url

    @property
    def capabilities(self) -> Capabilities:
        return self._store.capabilities

    def local_path(self, name: str) -> str:
        """The file that holds the object, for stores that say `memory_map`."""
        if not self.capabilities.memory_map:
            raise Refused(f"The objects of {self.url} are not local files.")
        path: str = self._store.local_path(name)  # type: ignore[attr-defined]
        return path

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._store.put_if_absent(name, parts)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._store.put(name, parts)

    def get(self, name: str) -> bytes:
        return self._store.get(name)

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._store.get_ranges(name, ranges)

    def stat(self, name: str) -> ObjectInfo:
        return self._store.stat(name)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        return self._store.list(prefix, after)

    def delete(self, name: str) -> None:
        self._store.delete(name)


class RetryStore(Layer):
    """Tries again what may succeed later: exponential backoff with full jitter, `attempts` calls in all.

    The waits are drawn evenly from 0 to `base_seconds`, then twice that, four times and so on, at
    most 30 s each (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
    """

    def __init__(
        self,
        store: ObjectStore,
        attempts: int = 5,
        base_seconds: float = 0.2,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(store)
        if attempts < 1:
            raise InvalidInput(f"{attempts} attempts can't store anything; at least 1 is needed.")
        self._attempts = attempts
        self._base_seconds = base_seconds
        self._clock = clock

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        """Create `name`. After an attempt with an unknown outcome, finding our own bytes is success."""
        unknown = False

        def attempt() -> None:
            nonlocal unknown
            try:
                self._store.put_if_absent(name, parts)
            except Exists:
                if not (unknown and self._holds(name, parts)):
                    raise
            except Unavailable:
                unknown = True
                raise

        try:
            self._retry(attempt)
        except OutlastError:
            if not unknown or not self._held_after_all(name, parts):
                raise

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._retry(lambda: self._store.put(name, parts))

    def get(self, name: str) -> bytes:
        return self._retry(lambda: self._store.get(name))

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._retry(lambda: self._store.get_ranges(name, ranges))

    def stat(self, name: str) -> ObjectInfo:
        return self._retry(lambda: self._store.stat(name))

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        failures = 0
        while True:
            try:
                for info in self._store.list(prefix, after):
                    after, failures = info.name, 0  # a broken listing goes on behind the last name it gave
                    yield info
                return
            except OutlastError as exc:
                failures += 1
                self._wait_or_raise(exc, failures)

    def delete(self, name: str) -> None:
        self._retry(lambda: self._store.delete(name))

    def _retry(self, call: Callable[[], T]) -> T:
        failures = 0
        while True:
            try:
                return call()
            except OutlastError as exc:
                failures += 1
                self._wait_or_raise(exc, failures)

    def _wait_or_raise(self, error: OutlastError, failures: int) -> None:
        if not error.retryable or failures >= self._attempts:
            raise error
        longest_seconds = min(RETRY_SECONDS_MAX, self._base_seconds * 2 ** (failures - 1))
        fraction = int.from_bytes(self._clock.random_bytes(4), "big") / 2**32
        self._clock.sleep(longest_seconds * fraction)

    def _held_after_all(self, name: str, parts: Sequence[Buffer]) -> bool:
        try:
            return self._holds(name, parts)
        except OutlastError:
            return False  # the caller raises the error that started this, which says more

    def _holds(self, name: str, parts: Sequence[Buffer]) -> bool:
        expected = b"".join(parts)
        try:
            return self._store.stat(name).size_bytes == len(expected) and self._store.get(name) == expected
        except NotFound:
            return False


class ThrottledStore(Layer):
    """At most `bytes_per_second` of content, both ways together, over all threads."""

    def __init__(self, store: ObjectStore, bytes_per_second: float, clock: Clock = SYSTEM_CLOCK) -> None:
        super().__init__(store)
        if bytes_per_second <= 0:
            raise InvalidInput(f"A rate of {bytes_per_second} bytes per second moves nothing.")
        self._rate = bytes_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._free_at_seconds = 0.0

    @property
    def capabilities(self) -> Capabilities:
        # A mapped file would be read past the throttle.
        return msgspec.structs.replace(self._store.capabilities, memory_map=False)

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._take(_size_bytes(parts))
        self._store.put_if_absent(name, parts)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._take(_size_bytes(parts))
        self._store.put(name, parts)

    def get(self, name: str) -> bytes:
        content = self._store.get(name)
        self._take(len(content))
        return content

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        contents = self._store.get_ranges(name, ranges)
        self._take(sum(map(len, contents)))
        return contents

    def _take(self, size_bytes: int) -> None:
        """Book the line for so many bytes behind what is booked already, and wait until they are through."""
        with self._lock:
            now = self._clock.monotonic_seconds()
            self._free_at_seconds = max(self._free_at_seconds, now) + size_bytes / self._rate
            wait_seconds = self._free_at_seconds - now
        self._clock.sleep(wait_seconds)


class ReadOnlyStore(Layer):
    """Refuses every change, whatever the store below would allow."""

    @property
    def capabilities(self) -> Capabilities:
        return msgspec.structs.replace(self._store.capabilities, readonly=True)

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        raise self._refusal("written", name)

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        raise self._refusal("written", name)

    def delete(self, name: str) -> None:
        raise self._refusal("deleted", name)

    def _refusal(self, action: str, name: str) -> Refused:
        return Refused(f"{self.url} was opened for reading only; it can't {action} {name}. Nothing was changed.")


class QuotaStore(Layer):
    """A budget for what is added through this layer; deleting and replacing give room back.

    `budget_bytes` may be raised at any time, as somebody who makes room on a full disk does.
    """

    def __init__(self, store: ObjectStore, budget_bytes: int) -> None:
        super().__init__(store)
        self.budget_bytes = budget_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        self._spend(name, _size_bytes(parts), 0, lambda: self._store.put_if_absent(name, parts))

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        self._spend(name, _size_bytes(parts), self._size_bytes_of(name), lambda: self._store.put(name, parts))

    def delete(self, name: str) -> None:
        freed_bytes = self._size_bytes_of(name)
        self._store.delete(name)
        with self._lock:
            self._used_bytes -= freed_bytes

    def _spend(self, name: str, size_bytes: int, freed_bytes: int, write: Callable[[], None]) -> None:
        """Set the room aside, write, and give back what was not needed.

        The old bytes of a replaced object are given back afterwards only: until then both exist.
        """
        with self._lock:
            if self._used_bytes + size_bytes > self.budget_bytes:
                raise StoreFull(
                    f"{name} needs {size_bytes} bytes, but {self._used_bytes} of {self.budget_bytes} are "
                    "used; it was not written, and what was stored before is unchanged.",
                    hint="Raise the budget or remove what is no longer needed, then try again.",
                )
            self._used_bytes += size_bytes
        written = False
        try:
            write()
            written = True
        finally:
            with self._lock:
                self._used_bytes -= freed_bytes if written else size_bytes

    def _size_bytes_of(self, name: str) -> int:
        try:
            return self._store.stat(name).size_bytes
        except NotFound:
            return 0


def own_folder(store: ObjectStore) -> bytes | None:
    """The folder that the objects of a local store are in, without symlinks; None for other stores."""
    if not store.capabilities.memory_map:
        return None
    path: str = store.local_path("format")  # type: ignore[attr-defined]  # what memory_map promises
    return os.path.realpath(os.path.dirname(os.fsencode(path)))


def open_store(url: str, clock: Clock = SYSTEM_CLOCK, *, pack_class: str = "") -> ObjectStore:
    """The store at `url`: a path, `file://`, `s3://`, `gs://`, `az://` or `memory://`.

    `pack_class`: the storage class of S3 in which packs are created, see `classes.AT_ONCE`. Nothing is
    contacted or created yet. Raises `InvalidInput` for anything else.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        if not url or re.match(r"(file|s3|gs|az|memory):", url):
            raise InvalidInput(
                f"{url!r} names no store.",
                hint="Write a path, or SCHEME://…; for a folder of that name, ./NAME.",
            )
        return LocalStore(url, clock=clock)
    match scheme.lower():
        case "file":
            return LocalStore(_file_path(url), clock=clock)
        case "memory":
            return MemoryStore(rest, clock=clock)
        case "s3" | "gs" | "az" as known:
            from outlast.store.cloud import CloudStore

            return RetryStore(CloudStore(f"{known}://{rest}", pack_class), clock=clock)
    raise InvalidInput(
        f"{scheme}:// is not a kind of store that is known here; nothing was touched.",
        hint="Known are a path, file://, s3://, gs://, az:// and memory://.",
    )


def _file_path(url: str) -> str:
    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"} or not parts.path.startswith("/"):
        raise InvalidInput(
            f"{url!r} names another machine; only its own files can be opened so.",
            hint="Write file:///ABSOLUTE/PATH, with three slashes, or the path alone.",
        )
    # Everything after the host is the path: a file name may hold "?" and "#".
    return unquote(url.partition("://")[2].removeprefix(parts.netloc), errors="surrogateescape")


def _size_bytes(parts: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in parts)
