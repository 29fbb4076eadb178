"""Which gradients are still needed: those that changed since the optimizer of their parameter last stepped."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# On the gradient itself: a new one may lie where an old one lay, and have its `id`.
_USED_UP = "_outlast_used_up_at_version"


def use_up(optimizer: torch.optim.Optimizer) -> None:
    """It has stepped: unless they change, its gradients matter no longer."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                setattr(parameter.grad, _USED_UP, parameter.grad._version)


def needed(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """`id` of the parameters whose gradients are still needed."""
    return {
        id(parameter)
        for each in optimizers
        for group in each.param_groups
        for parameter in group["params"]
        if (grad := parameter.grad) is not None and getattr(grad, _USED_UP, None) != grad._version
    }
