"""Copy a state out of the training's way, so that what is saved is one instant.

Parameters and the state of optimizers do not change between two calls of `optimizer.step()`. They are copied in
a thread, or by the GPU on a stream of its own, while forward and backward run, and only the next step of an
optimizer waits for what is left of it. All else (buffers, gradients, counters, random numbers) is copied at once.

Proof that the copy is one instant: the unsteady part is copied within the call, or by the device before anything
that it is given later. Each steady tensor belongs to an optimizer whose hook calls `hold` before its next step:
then the copy is done, or the device does it first. What changes a steady tensor otherwise, in place, raises the
version that torch counts for it; versions are compared when the copy is done or held, whichever comes first. Where
one was raised the copy is thrown away, and the tensor is named. Not counted, and so not noticed, are writes through
`.data` or numpy: who makes them while a copy is under way needs `overlap=False`.

What has not changed since the last save lies in the memory for copies already, and the ids of its chunks are known.
It is compared with that byte for byte, which costs as much as to copy it, and saves hashing it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from outlast.checkpoint.accelerator import Accelerator, Cuda
from outlast.checkpoint.background import Background
from outlast.checkpoint.leaves import Leaf, private_memory, tensor_bytes
from outlast.checkpoint.pieces import Ids, LeafBytes
from outlast.errors import Refused

_ALIGN_BYTES = 4096
_MADV_WIPEONFORK = 18  # madvise(2), Linux 4.14
_memcmp = ctypes.CDLL(None).memcmp  # without the GIL
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

Place = tuple[str, str]
"""(file, name of the leaf)"""

_Placed = Sequence[tuple[Place, Leaf]]
_Versions = list[tuple[Place, torch.Tensor, int]]


class Staged:
    """One copy under way. That it is whole, and of one instant, is known once `check` has returned."""

    def __init__(self, ids: dict[Place, Ids] | None = None) -> None:
        self.contents: dict[Place, memoryview] = {}
        """where each leaf is copied to; see `content`"""
        self._ids = {} if ids is None else ids
        self._coming: set[Place] = set()
        """what is not copied yet"""
        self._came = threading.Condition()
        self._done = threading.Event()
        self._host_done = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._background: Background | None = None
        self.accelerator: Accelerator | None = None
        self.marks: list[Any] = []
        """of what it is copying"""
        self.versions: _Versions = []
        """of the same, until they were compared"""

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def hold(self) -> None:
        """What is done to the state from now on comes after the copy. Raises nothing: see `check`."""
        if self._background is None:
            return
        self._background.settle()
        self._host_done.wait()
        if self.accelerator is not None and not self.done:
            self._compare_versions()
            for mark in self.marks:
                self.accelerator.hold(mark)

    def end(self) -> None:
        """Wait until nothing is written to its memory any more."""
        if self._background is not None:
            self._background.wait()

    def check(self) -> None:
        """Wait until nothing of the live state is needed. Raises what went wrong while the copy was made."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def content(self, file: str, name: str) -> LeafBytes:
        """A leaf, as soon as its bytes are there. Raises what went wrong until then."""
        place = file, name
        with self._came:
            self._came.wait_for(lambda: place not in self._coming)
        if self._error is not None:
            raise self._error
        return LeafBytes(self.contents[place], self._ids.get(place, {}))

    def finish(self, error: BaseException | None = None) -> None:
        self._error = self._error or error
        self._host_done.set()
        self._done.set()
        with self._came:
            self._coming.clear()
            self._came.notify_all()

    def _compare_versions(self) -> None:
        with self._lock:
            versions, self.versions = self.versions, []
            try:
                _refuse_changed(versions)
            except Refused as exc:
                self._error = exc

    def copy(self, place: Place, leaf: Leaf) -> None:
        """What the host has to copy, unless it is there."""
        target = np.frombuffer(self.contents[place], np.uint8)
        known = self._ids.get(place)
        is_plain = leaf.tensor.device.type == "cpu" and leaf.tensor.is_contiguous()
        if known and is_plain and not _memcmp(leaf.tensor.data_ptr(), target.ctypes.data, leaf.nbytes):
            return
        self._ids[place] = {}
        if is_plain:
            np.copyto(target, np.frombuffer(tensor_bytes(leaf.tensor), np.uint8))  # a plain memcpy, without the GIL
        elif leaf.nbytes:
            _as_tensor(target.data, leaf).copy_(leaf.tensor)

    def will_copy(self, leaves: _Placed) -> None:
        """Say which are copied after the call that saves has returned."""
        self._coming = {place for place, _ in leaves}

    def start(self, leaves: _Placed) -> None:
        """Copy these in a thread, and wait there for what the device copies."""
        work = partial(self._copy_later, leaves, _versions_of(leaves))
        lost = partial(self.finish, Refused("the copy of the state was interrupted; nothing was saved."))
        self._background = Background(work, lost, name="outlast-stage", daemon=True)
        self._background.start()

    def _copy_later(self, leaves: _Placed, versions: _Versions) -> None:
        try:
            for place, leaf in leaves:
                self.copy(place, leaf)
                with self._came:
                    self._coming.discard(place)
                    self._came.notify_all()
            _refuse_changed(versions)
            self._host_done.set()
            if self.accelerator is not None:
                for mark in self.marks:
                    self.accelerator.wait(mark)
                self._compare_versions()
        except BaseException as exc:  # noqa: BLE001  it is raised by `check`, in the thread that saves
            self.finish(exc)
        else:
            self.finish()


class Stage:
    """Memory for one copy, kept from save to save: fresh memory costs as much as the copy itself."""

    def __init__(self, accelerator: Accelerator | None = None) -> None:
        self._accelerator = accelerator or Cuda()
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._pinned: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._last: Staged | None = None
        self._layout: dict[Place, tuple[int, int]] = {}
        self._ids: dict[Place, Ids] = {}
        """of what lies in the memory"""

    def reserve(self, count_bytes: int) -> None:
        """Have so much memory at hand. Its pages are touched by whoever copies into them first."""
        if len(self._memory) >= count_bytes:
            return
        memory = private_memory(count_bytes)
        # Workers of a loader that are forked don't need it, and while they had it, each page would be copied anew.
        # They get zeros: a hole in its place would be given to something else, and unmapped with what maps it here.
        memory.madvise(_MADV_WIPEONFORK)
        self._memory = np.frombuffer(memory, np.uint8)

    def begin(self, files: dict[str, list[Leaf]], *, overlap: bool) -> Staged:
        """Copy: what is not steady before this returns, the rest in a thread.

        One copy at a time: one that is left over from a save that failed or was interrupted is waited for.
        """
        if self._last is not None:
            self._last.end()
        leaves = [((file, leaf.name), leaf) for file, found in files.items() for leaf in found]
        on_device: list[tuple[Place, Leaf]] = []
        on_host: list[tuple[Place, Leaf]] = []
        for each in leaves:
            (on_device if self._accelerator.owns(each[1].tensor) else on_host).append(each)
        layout, need = _lay_out(on_host)
        if layout != self._layout or need > len(self._memory):
            self._ids = {}
        self._layout = layout
        self.reserve(need)
        staged = self._last = Staged(self._ids)
        staged.contents |= _runs(layout, self._memory)
        if on_device:
            self._begin_on_device(on_device, staged, overlap=overlap)
        later = [each for each in on_host if each[1].steady and overlap]
        staged.will_copy([*later, *on_device])
        for place, leaf in on_host:
            if not (leaf.steady and overlap):
                staged.copy(place, leaf)
        if later or on_device:
            staged.start(later)
        else:
            staged.finish()
        return staged

    def hold(self) -> None:
        """What is done to the state from now on comes after the copy that is under way, if one is."""
        if self._last is not None:
            self._last.hold()

    def forget(self) -> None:
        """In a forked process, where nothing is under way and the memory holds zeros."""
        self._last, self._layout = None, {}

    def _begin_on_device(self, leaves: _Placed, staged: Staged, *, overlap: bool) -> None:
        """Give the device its copies: first what isn't steady, which all work from now on comes after."""
        layout, need = _lay_out(leaves)
        if len(self._pinned) < need:
            self._pinned = self._accelerator.reserve(need)
        staged.contents |= _runs(layout, self._pinned)
        at_once = [each for each in leaves if not (each[1].steady and overlap)]
        later = [each for each in leaves if each[1].steady and overlap]
        for some in (at_once, later):
            pairs = [(leaf.tensor, _as_tensor(staged.contents[place], leaf)) for place, leaf in some if leaf.nbytes]
            mark = self._accelerator.copy(pairs)
            if some is at_once:
                self._accelerator.hold(mark)
            staged.marks.append(mark)
        staged.accelerator, staged.versions = self._accelerator, _versions_of(later)


def _versions_of(leaves: _Placed) -> _Versions:
    return [(place, leaf.tensor, leaf.tensor._version) for place, leaf in leaves]


def _lay_out(leaves: _Placed) -> tuple[dict[Place, tuple[int, int]], int]:
    """The run of memory of each leaf, as (offset, length), and how much they need together."""
    layout, at = {}, 0
    for place, leaf in leaves:
        layout[place] = at, leaf.nbytes
        at += -(-leaf.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES if leaf.nbytes >= _ALIGN_BYTES else leaf.nbytes
        at += -at % 64
    return layout, at


def _runs(layout: dict[Place, tuple[int, int]], memory: NDArray[np.uint8]) -> dict[Place, memoryview]:
    view = memory.data
    return {place: view[at : at + length] for place, (at, length) in layout.items()}


def _as_tensor(memory: memoryview, leaf: Leaf) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(memory, np.uint8)).view(leaf.tensor.dtype).view(leaf.tensor.shape)


def _refuse_changed(versions: _Versions) -> None:
    for (file, name), tensor, version in versions:
        if tensor._version != version:
            raise Refused(
                f"{name} of {file} changed outside of its optimizer while it was copied; this save was "
                "dropped, and the one before is whole.",
                hint="Change parameters in `optimizer.step()` alone, or make the run with `overlap=False`.",
            )
