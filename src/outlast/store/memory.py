"""A store in memory: for examples, tests and simulation. It ends with the process."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from itertools import islice

from outlast.clock import SYSTEM_CLOCK, Clock
from outlast.errors import Exists, NotFound
from outlast.store.base import Buffer, Capabilities, ObjectInfo, check_name
from outlast.store.local import check_range


class _Shelf:
    """The objects of one memory store: name -> (bytes, modified in nanoseconds)."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.names: list[str] = []
        """of the objects, in order"""

    def put(self, name: str, content: bytes, now_ns: int) -> None:
        if name not in self.objects:
            insort(self.names, name)
        self.objects[name] = content, now_ns

    def delete(self, name: str) -> None:
        if self.objects.pop(name, None) is not None:
            del self.names[bisect_left(self.names, name)]

    def listed(self, prefix: str, after: str) -> list[ObjectInfo]:
        found = []
        for name in islice(self.names, max(bisect_left(self.names, prefix), bisect_right(self.names, after)), None):
            if not name.startswith(prefix):
                break
            content, modified_ns = self.objects[name]
            found.append(ObjectInfo(name, len(content), modified_ns / 1e9))
        return found


_shelves: dict[str, _Shelf] = {}
_shelves_lock = threading.Lock()


class MemoryStore:
    """Objects in a dictionary. Within one process all stores of one non-empty name are the same.

    >>> store = MemoryStore()
    >>> store.put("greeting", [b"hello ", b"world"])
    >>> store.get_ranges("greeting", [(6, 5)])
    [b'world']
    """

    def __init__(self, name: str = "", clock: Clock = SYSTEM_CLOCK) -> None:
        self._name = name
        self._clock = clock
        if name:
            with _shelves_lock:
                self._shelf = _shelves.setdefault(name, _Shelf())
        else:
            self._shelf = _Shelf()

    @property
    def url(self) -> str:
        return f"memory://{self._name}"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(durable_when_listed=True)

    def put_if_absent(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        with self._shelf.lock:
            if check_name(name) in self._shelf.objects:
                raise Exists(f"{name} already exists; it was left as it is.")
            self._shelf.put(name, content, self._clock.now_ns())

    def put(self, name: str, parts: Sequence[Buffer]) -> None:
        content = b"".join(parts)
        with self._shelf.lock:
            self._shelf.put(check_name(name), content, self._clock.now_ns())

    def get(self, name: str) -> bytes:
        return self._find(name)[0]

    def get_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        content, _ = self._find(name)
        for offset, length in ranges:
            check_range(name, offset, length, len(content))
        return [content[offset : offset + length] for offset, length in ranges]

    def stat(self, name: str) -> ObjectInfo:
        content, modified_ns = self._find(name)
        return ObjectInfo(name, len(content), modified_ns / 1e9)

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        with self._shelf.lock:
            found = self._shelf.listed(prefix, after)
        yield from found

    def delete(self, name: str) -> None:
        with self._shelf.lock:
            self._shelf.delete(check_name(name))

    def _find(self, name: str) -> tuple[bytes, int]:
        with self._shelf.lock:
            found = self._shelf.objects.get(check_name(name))
        if found is None:
            raise NotFound(f"There is no object {name}.")
        return found
