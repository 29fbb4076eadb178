"""Copies out of a GPU that nobody waits for: on streams of their own, into pinned memory.

What this promises to `stage`, and what a stand-in in the tests promises too: `copy` takes what the tensor holds
after all work that was given to the device so far, and `hold` makes all work given to it from then on come after
the copies. The host waits in `wait` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray


class Accelerator(Protocol):
    def owns(self, tensor: torch.Tensor) -> bool: ...

    def reserve(self, count_bytes: int) -> NDArray[np.uint8]:
        """Memory of the host that the device reaches by itself."""
        ...

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Begin to copy each first to its second; the moment when that is done. Until then no memory of a first is
        given to another tensor."""
        ...

    def hold(self, mark: Any) -> None:
        """Let the devices, not the host, wait for that moment before they do what they are given from now on."""
        ...

    def wait(self, mark: Any) -> None:
        """Let the host wait for it."""
        ...


class Cuda:
    """One stream for each device, beside the one that trains."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cuda

    def reserve(self, count_bytes: int) -> NDArray[np.uint8]:
        return torch.empty(count_bytes, dtype=torch.uint8, pin_memory=True).numpy()

    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[tuple[torch.device, torch.cuda.Event]]:
        events = []
        for device in dict.fromkeys(tensor.device for tensor, _ in pairs):
            stream = self._streams.get(device) or self._streams.setdefault(
                device,
                torch.cuda.Stream(device),  # type: ignore[no-untyped-call]
            )
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for tensor, target in pairs:
                    if tensor.device == device:
                        target.copy_(tensor, non_blocking=True)
                        tensor.record_stream(stream)
            events.append((device, stream.record_event()))
        return events

    def hold(self, mark: list[tuple[torch.device, torch.cuda.Event]]) -> None:
        for device, event in mark:
            torch.cuda.current_stream(device).wait_event(event)

    def wait(self, mark: list[tuple[torch.device, torch.cuda.Event]]) -> None:
        for _, event in mark:
            event.synchronize()
