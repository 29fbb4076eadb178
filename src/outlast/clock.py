"""The only reader of time and randomness, so that tests and simulations own both."""

from __future__ import annotations

import os
import time  # noqa: TID251  the one place
from typing import Protocol


class Clock(Protocol):
    """Wall time, a monotonic stopwatch, sleep and randomness."""

    def now_ns(self) -> int:
        """Nanoseconds since the Unix epoch, UTC."""
        ...

    def monotonic_seconds(self) -> float:
        """Seconds on a clock that never goes back; only differences mean anything."""
        ...

    def sleep(self, seconds: float) -> None: ...

    def random_bytes(self, count: int) -> bytes:
        """Bytes fit for keys, salts and write ids."""
        ...


class SystemClock:
    """The machine's clock and the operating system's randomness."""

    def now_ns(self) -> int:
        return time.time_ns()

    def monotonic_seconds(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)


class ManualClock:
    """A clock that moves only when told to, with randomness from a seed.

    >>> clock = ManualClock(seed=7)
    >>> clock.sleep(90)
    >>> clock.monotonic_seconds()
    90.0
    """

    def __init__(self, seed: int = 0, now_ns: int = 1_750_000_000_000_000_000) -> None:
        from random import Random  # noqa: TID251  the one place; here, for it loads OpenSSL

        self._random = Random(seed)
        self._start_ns = now_ns
        self._elapsed_ns = 0

    def now_ns(self) -> int:
        return self._start_ns + self._elapsed_ns

    def monotonic_seconds(self) -> float:
        return self._elapsed_ns / 1e9

    def sleep(self, seconds: float) -> None:
        self._elapsed_ns += int(seconds * 1e9)

    def random_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)


SYSTEM_CLOCK = SystemClock()
