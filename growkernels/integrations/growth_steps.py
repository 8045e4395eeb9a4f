"""What the callbacks of all trainers share: when to record, when to grow, and what goes along."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from growkernels.distributed import Growing, growing
from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.growth.layer_insertion.triggers import FixedStep, Interval, MeritRatio, Trigger
from growkernels.growth.processes import Group, ranks_of
from growkernels.nn.optimizers import Optimizers

Driver = LayerInsertion | NeuronScaling
LOSS_FREE = (FixedStep, Interval, MeritRatio)  # triggers that do not look at the loss


class GrowthSteps:
    """A trigger, a driver, and a growth of the model whenever both say so.

    When the trigger is due after a step, the next ``batches`` backward passes are recorded, and at
    the end of the step that has the last of them the model grows. While recordings run the
    training goes on, so with more than one step's batches they are of slightly different weights.

    Args:
        trigger: says after which steps to record (``gk.growth.Interval(...)`` and the like), and
            whether the merits are worth an insertion.
        driver: driver(module) builds what records and selects; None: ``LayerInsertion``.
        batches: backward passes to record, on each process.
        budget, min_eligible, init: of a NeuronScaling's growth.
        tau: of a LayerInsertion's, see ``Growing.insert_best``.
        module: path of the part of the model that grows; "": the model.
        copies: other models of the same structure (EMA copies), which grow along.
        group: the processes that decide together; None: those that train together.

    Attributes:
        grown: the steps at which the model has grown.
        waiting: whether backward passes are to be recorded.
    """

    def __init__(
        self,
        trigger: Trigger,
        driver: Callable[[nn.Module], Driver] | None = None,
        *,
        batches: int = 1,
        tau: float | None = None,
        budget: int | None = None,
        min_eligible: int = 60,
        init: str = "parent",
        module: str = "",
        copies: Sequence[nn.Module] = (),
        group: Group = None,
    ) -> None:
        if batches < 1:
            raise ValueError(f"batches is {batches}; at least one backward pass must be recorded.")
        self.trigger = trigger
        self.batches = batches
        self.tau = tau
        self.budget = budget
        self.min_eligible = min_eligible
        self.init = init
        self.module = module
        self.copies = tuple(copies)
        self.group = group
        self.grown: list[int] = []
        self._make = driver or LayerInsertion
        self._driver: Driver | None = None
        self._recorded = 0
        self.waiting = False  # for backward passes to record
        self._recording = False
        self._open = ExitStack()
        self._stack = ExitStack()
        self._growth: Growing | None = None

    @property
    def wants_a_pass(self) -> bool:
        """Whether the next backward pass is to be recorded."""
        return self.waiting and self._recorded < self.batches

    def part(self, model: nn.Module) -> nn.Module:
        """The part of a model that grows."""
        return model.get_submodule(self.module)

    def watch(self, wrapper: nn.Module, model: nn.Module) -> None:
        """Before a forward pass whose backward pass may have to be recorded."""
        if self.wants_a_pass and self._growth is None:
            self._driver = self._make(self.part(model))
            context = growing(wrapper, None, group=self.group, driver=self._driver)
            self._growth = self._open.enter_context(context)

    def begin_pass(self, loss_scale: float = 1.0) -> None:
        """Before a backward pass: record it, if passes are wanted."""
        if not self.wants_a_pass or self._growth is None:
            return
        self._recording = True
        self._stack.enter_context(self._growth.recording(loss_scale))

    def end_pass(self) -> None:
        """After it."""
        if self._recording:
            self._recording = False
            self._recorded += 1
            self._stack.pop_all().close()

    def abandon_pass(self) -> None:
        """Leave a recording that no backward pass came to, without counting it."""
        self._recording = False
        self._stack.pop_all()

    def end_step(
        self,
        step: int,
        loss: float,
        model: nn.Module,
        optimizer: Optimizers,
        copies: Iterable[nn.Module] = (),
    ) -> bool:
        """After an optimizer step: grow, if enough was recorded; else ask the trigger.

        Returns:
            Whether the model has grown.
        """
        if not self.waiting:
            self.waiting = self.trigger.due(step, self._agreed(model, loss))
            return False
        if self._recorded < self.batches or self._growth is None or self._driver is None:
            return False
        before = len(insertions(self.part(model)))
        grew = self._grow(self._growth, self._driver, optimizer)
        if grew is None:  # overflow, as in a batch that a gradient scaler skips: once more
            self._driver.reset()
            self._recorded = 0
            return False
        self.close()
        if grew:
            new = insertions(self.part(model))[before:]
            for other in (*self.copies, *copies):
                rebuild(self.part(other), new)
            self.grown.append(step)
        return grew

    def close(self, waiting: bool = False) -> None:
        """Take hooks off; what was recorded is forgotten, and is still waited for or is not."""
        self._open.close()
        if self._driver is not None:
            self._driver.close()
        self._stack, self._open = ExitStack(), ExitStack()
        self._driver = self._growth = None
        self._recorded, self._recording, self.waiting = 0, False, waiting

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints. Batches that were recorded are recorded anew after a restart."""
        return {
            "waiting": self.waiting,
            "grown": list(self.grown),
            "trigger": self.trigger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as the run that ``state_dict`` is of."""
        self.waiting = state["waiting"]
        self.grown = list(state["grown"])
        self.trigger.load_state_dict(state["trigger"])

    def _grow(self, growth: Growing, driver: Driver, optimizer: Optimizers) -> bool | None:
        growth.optimize_with(optimizer)
        ranks = ranks_of(growth.model, self.group)
        if not all(ranks.gathered(_batches(driver) > 0)):
            return None
        if isinstance(driver, NeuronScaling):
            if self.budget is None:
                raise ValueError(
                    "A NeuronScaling needs budget=, the parameters that a growth adds."
                )
            return bool(growth.grow_best(self.budget, self.min_eligible, init=self.init))
        merits = growth.merits()
        if not bool(merits.values.isfinite().all()):
            return None
        if not self.trigger.accept(merits):
            return False
        return growth.insert_best(self.tau, merits=merits) is not None

    def _agreed(self, model: nn.Module, loss: float) -> float:
        """The mean loss over all processes, where the trigger looks at it."""
        ranks = ranks_of(model, self.group)
        if not ranks.several or isinstance(self.trigger, LOSS_FREE):
            return loss
        device = next(model.parameters()).device
        mean = ranks.sum(torch.tensor(loss, device=device)) / ranks.number
        return math.inf if math.isinf(float(mean)) else float(mean)


def _batches(driver: Driver) -> int:
    """How many batches this process has recorded; those that overflow do not count."""
    if isinstance(driver, NeuronScaling):
        return driver._followed.recorder.kept.batches
    return driver._recorder.sums.batches
