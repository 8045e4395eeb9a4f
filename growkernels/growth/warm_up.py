"""A warm-up of what a growth added, beside old parameters that go on at full speed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.nn.exchange import check_follows
from growkernels.nn.new_entries import NewSince


class WarmUp:
    """Scales the optimizer's updates of new entries from 1 / steps up to 1, and then goes away.

    ::

        gk.growth.WarmUp(model, optimizer, steps=200)     # before the growth
        scaling.grow(chosen, optimizer)                   # or any other driver's growth
        ...                                               # train on

    Made before a growth, it waits. From the first step at which the optimizer holds parameters, or
    rows and columns of widened ones, that were not there when it was made, step s changes these by
    s / steps of what the optimizer did, for any optimizer, weight decay included. Old entries are
    left alone, those of widened parameters too. A learning rate for new entries alone could not do
    this, because they share a parameter with old ones.

    Of the learning rate of old parameters the papers say different things. LEMON (arXiv 2310.07999)
    takes the peak of training from scratch again and lets it fall faster. SensLI and Beyond Uniform
    Scaling go on with the schedule as it is, and so does this.

    Where ``steps`` are over the optimizer's hooks are gone. What was warmed up is not part of any
    state: a run that is resumed in the middle goes on at full speed.

    Args:
        model, optimizer: as they are before the growth.
        steps: of the ramp, at least 1.

    Attributes:
        done: how many steps have been scaled.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, steps: int) -> None:
        check_follows(optimizer)
        if steps < 1:
            raise ValueError(f"steps is {steps}; a warm-up takes at least one step.")
        self.steps = steps
        self.done = 0
        self._new = NewSince(model)
        self._before: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._begins),
            optimizer.register_step_post_hook(self._ended),
        ]

    def close(self) -> None:
        """Take the hooks off the optimizer: everything goes on at full speed."""
        for handle in self._handles:
            handle.remove()
        self._before = []

    def _begins(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                mask = self._new.mask(parameter)
                if mask is not None:
                    self._before.append((parameter, mask, parameter.detach()[mask]))

    @torch.no_grad()
    def _ended(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._before:
            return
        self.done += 1
        for parameter, mask, before in self._before:
            parameter[mask] = before + (parameter[mask] - before) * (self.done / self.steps)
        self._before = []
        if self.done == self.steps:
            self.close()
