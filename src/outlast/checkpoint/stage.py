"""Copy a state out of the training's way, so that what is saved is one instant.

Parameters and the state of optimizers do not change between two calls of `optimizer.step()`. They are copied in
a thread while forward and backward run, and only the next step of an optimizer waits for what is left of it. All
else (buffers, gradients, counters, random numbers) is copied at once.

Proof that the copy is one instant: the unsteady part is copied within the call; each steady tensor belongs to an
optimizer whose hook holds its next step until the copy is done. What changes it otherwise, in place, raises the
version that torch counts for each tensor; the copy is then thrown away, and the tensor is named.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable

import numpy as np
import torch

from outlast.checkpoint.leaves import Leaf, tensor_bytes
from outlast.errors import Refused

_ALIGN_BYTES = 4096
_PIECE_BYTES = 32 << 20

Place = tuple[str, str]
"""(file, name of the leaf)"""


class Staged:
    """One copy under way. `contents` is whole once `wait` has returned."""

    def __init__(self) -> None:
        self.contents: dict[Place, memoryview] = {}
        self._done = threading.Event()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """Until nothing of the live state is needed any more. Raises nothing: see `check`."""
        self._done.wait()

    def check(self) -> None:
        """Raises what went wrong while the copy was made."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def finish(self, error: BaseException | None = None) -> None:
        self._error = error
        self._done.set()


class Stage:
    """Memory for one copy, kept from save to save: fresh memory costs as much as the copy itself."""

    def __init__(self) -> None:
        self._arena: np.ndarray[tuple[int], np.dtype[np.uint8]] = np.empty(0, np.uint8)

    def reserve(self, count_bytes: int) -> None:
        """Have so much memory at hand, its pages touched."""
        if len(self._arena) >= count_bytes:
            return
        memory = mmap.mmap(-1, count_bytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._arena = np.frombuffer(memory, np.uint8)
        self._arena[:: mmap.PAGESIZE] = 0

    def begin(self, files: dict[str, list[Leaf]], *, overlap: bool) -> Staged:
        """Copy: what is not steady before this returns, the rest in a thread."""
        leaves = [((file, leaf.name), leaf) for file, found in files.items() for leaf in found]
        room: dict[Place, tuple[int, int]] = {}
        at = 0
        for place, leaf in leaves:
            room[place] = (at, leaf.nbytes)
            at += -(-leaf.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES if leaf.nbytes >= _ALIGN_BYTES else leaf.nbytes
            at += -at % 64
        self.reserve(at)
        staged = Staged()
        arena = self._arena.data
        for place, (start, length) in room.items():
            staged.contents[place] = arena[start : start + length]
        later = [each for each in leaves if each[1].steady and overlap]
        _copy(((place, leaf) for place, leaf in leaves if not (leaf.steady and overlap)), staged)
        if not later:
            staged.finish()
            return staged
        versions = [leaf.tensor._version for _, leaf in later]
        threading.Thread(target=_copy_later, args=(later, versions, staged), name="outlast-stage", daemon=True).start()
        return staged


def _copy(leaves: Iterable[tuple[Place, Leaf]], staged: Staged) -> None:
    for place, leaf in leaves:
        if leaf.nbytes:
            target = np.frombuffer(staged.contents[place], np.uint8)
            if leaf.tensor.device.type == "cpu" and leaf.tensor.is_contiguous():
                np.copyto(target, np.frombuffer(tensor_bytes(leaf.tensor), np.uint8))  # a plain memcpy, without the GIL
            else:
                torch.from_numpy(target).view(leaf.tensor.dtype).view(leaf.tensor.shape).copy_(leaf.tensor)


def _copy_later(leaves: list[tuple[Place, Leaf]], versions: list[int], staged: Staged) -> None:
    try:
        _copy(leaves, staged)
        for (place, leaf), version in zip(leaves, versions, strict=True):
            if leaf.tensor._version != version:
                raise Refused(
                    f"{place[1]} of {place[0]} changed outside of its optimizer while it was copied; this save was "
                    "dropped, and the one before is whole.",
                    hint="Change parameters in `optimizer.step()` alone, or save with `overlap=False`.",
                )
    except BaseException as exc:  # noqa: BLE001  it is raised by `check`, in the thread that saves
        staged.finish(exc)
    else:
        staged.finish()
