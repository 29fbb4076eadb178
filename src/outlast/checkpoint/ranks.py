"""The processes of one training: what they tell each other while they save, load and decide.

Every exchange goes through groups of processes of its own, on the CPU (gloo), so that it never meets the
training's own collectives; and everything that is sent is JSON or numbers. A process that fails in the work before
an exchange says so in the exchange: then it raises on all of them, and none waits for ever.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist

from outlast.errors import Busy, Corrupt, OutlastError, Refused, StoreFull, Unavailable

T = TypeVar("T")


class _Failure(msgspec.Struct):
    kind: str
    message: str
    hint: str = ""


class Channel:
    """One order of exchanges, the same on all ranks; each channel is for one thread of each process."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup | None) -> None:
        self._rank, self._size, self._group = rank, size, group

    def exchange(self, work: Callable[[], T], kind: type[T]) -> list[T]:
        """Do the work; what it came to on each rank. Raises what failed here, or else what failed elsewhere."""
        if self._size == 1:
            return [work()]
        mine, failure = b"", None
        try:
            mine = msgspec.json.encode(work())
        except Exception as exc:  # noqa: BLE001  raised as soon as the others know
            failure = exc
        told = b"+" + mine if failure is None else b"-" + msgspec.json.encode(_told(failure))
        answers = self._all(told)
        for rank, answer in enumerate(answers):
            if answer[:1] != b"+":  # the first one's is raised on all, so that all do the same about it
                if failure is not None and rank == self._rank:
                    raise failure
                raise _heard(rank, msgspec.json.decode(answer[1:], type=_Failure)) from failure
        return [msgspec.json.decode(answer[1:], type=kind) for answer in answers]

    def from_first(self, work: Callable[[], T], kind: type[T]) -> T:
        """What the work comes to on rank 0; the others don't do it."""
        kind_or_none: Any = kind | None
        work_or_none: Any = lambda: work() if self._rank == 0 else None  # noqa: E731
        found: list[T] = self.exchange(work_or_none, kind_or_none)
        return found[0]

    def numbers(self, mine: Sequence[float]) -> list[list[float]]:
        """A few numbers of each rank: the cheapest exchange."""
        if self._size == 1:
            return [list(mine)]
        return [each.tolist() for each in self._gather(torch.tensor(mine, dtype=torch.float64))]

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(mine) for _ in range(self._size)]
        try:
            dist.all_gather(found, mine, group=self._group)
        except RuntimeError as exc:
            raise Unavailable(
                f"rank {self._rank} lost another rank of this training: {exc}; what was saved before is whole.",
                hint="Start the training again on all ranks: it goes on from the last checkpoint.",
            ) from exc
        return found

    def _all(self, mine: bytes) -> list[bytes]:
        lengths = [int(each[0]) for each in self.numbers([float(len(mine))])]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        return [each.numpy().tobytes()[:length] for each, length in zip(self._gather(padded), lengths, strict=True)]


class Ranks:
    """Who takes part. `save` is the channel of saves in the background, `main` that of the training's own thread."""

    def __init__(self, *, alone: bool = False) -> None:
        together = not alone and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        groups = [dist.new_group(backend="gloo") if together else None for _ in range(2)]
        self.main, self.save = (Channel(self.rank, self.size, group) for group in groups)
        self._groups = [group for group in groups if group is not None]
        self.is_one_host = len(set(self.main.exchange(socket.gethostname, str))) == 1

    def close(self) -> None:
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups.clear()

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def _told(error: Exception) -> _Failure:
    if isinstance(error, OutlastError):
        return _Failure(error.kind, error.message, error.hint or "")
    return _Failure("failed", f"{type(error).__name__}: {error}")


def _heard(rank: int, failure: _Failure) -> OutlastError:
    kinds = (Refused, Corrupt, StoreFull, Unavailable, Busy)
    kind = next((each for each in kinds if each.kind == failure.kind), OutlastError)
    return kind(f"rank {rank} failed: {failure.message}", hint=failure.hint)


def shares(held: Sequence[Sequence[tuple[str, int]]]) -> list[set[str]]:
    """Which rank stores which chunk, so that each is stored once and all store about as many bytes. Pure.

    `held`: for each rank the (id, bytes) of what it has. Every rank comes to the same answer.
    """
    holders: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for rank, chunks in enumerate(held):
        for chunk, length in dict(chunks).items():
            holders.setdefault(chunk, []).append(rank)
            sizes[chunk] = length
    load = [0] * len(held)
    mine: list[set[str]] = [set() for _ in held]
    # What only one rank has comes first, and then the largest: the rest evens it out.
    for chunk in sorted(holders, key=lambda each: (len(holders[each]), -sizes[each], each)):
        rank = min(holders[chunk], key=lambda each: (load[each], each))
        mine[rank].add(chunk)
        load[rank] += sizes[chunk]
    return mine
