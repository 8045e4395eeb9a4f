"""One training of the study: a start, a plan of basis convolutions, and when it is in force."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from growkernels.data.images import ImageData
from growkernels.experiments.basis.settings import BasisSettings
from growkernels.experiments.basis.sgd import ImageTraining
from growkernels.experiments.seeds import seeded
from growkernels.growth.basis_search import SkipSchedule
from growkernels.timing import now

Plan = dict[str, int]  # module path -> number of basis filters

# What a generator is for, so that no two draw the same numbers.
INITIAL_VALUES, TRAINING_ORDER = range(2)


@dataclass(frozen=True)
class Task:
    """A training of ``epochs`` epochs.

    Tasks of one ``run`` start from the same dense network and see the same images in the same
    order. The plan is in force in all epochs (``order`` "none"), or before ("basis_first") or after
    ("full_first") ``settings.switch`` of them. The first part of those two is the same as that of
    the task named by ``branch_of``, so they begin with its state there.
    """

    name: str
    run: int
    epochs: int
    plan: Plan = field(default_factory=dict)
    order: str = "none"
    branch_of: str | None = None


@dataclass
class Curves:
    """One value per epoch: mean training loss, test loss, accuracy (%), seconds of training."""

    loss: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Training:
    """A task's training, with a state that can be saved and restored.

    All randomness is a function of (the study's seed, the task's run, the epoch), so a restored
    training continues exactly as it would have.
    """

    def __init__(
        self,
        task: Task,
        settings: BasisSettings,
        data: ImageData,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task = task
        self.seed = settings.seed
        self.images = ImageTraining(settings.recipe, task.epochs, data, device)
        self.switch_epoch = round(settings.switch * task.epochs)
        self.schedule = SkipSchedule(task.order, 0 if task.order == "none" else self.switch_epoch)
        self.epoch = 0
        self.curves = Curves()
        self.model = self.images.new_network(seeded(self.seed, task.run, INITIAL_VALUES))
        self.optimizer = self.images.new_optimizer(self.model)
        self._take_form_of(0)

    @property
    def done(self) -> bool:
        return self.epoch == self.task.epochs

    def step(self) -> None:
        """One epoch of training, then the test."""
        self._take_form_of(self.epoch)
        generator = seeded(self.seed, self.task.run, TRAINING_ORDER, self.epoch)
        start = now(self.images.device)
        loss = self.images.train_epoch(self.model, self.optimizer, self.epoch, generator)
        self.curves.seconds.append(now(self.images.device) - start)
        self.curves.loss.append(loss)
        test_loss, accuracy = self.images.test(self.model)
        self.curves.test_loss.append(test_loss)
        self.curves.accuracy.append(accuracy)
        self.epoch += 1

    def _take_form_of(self, epoch: int) -> None:
        """Full or basis convolutions, as the schedule has them in this epoch."""
        self.schedule.switch(epoch, self.model, self.task.plan, self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Everything :meth:`load_state_dict` needs; loads with ``weights_only=True``.

        A finished training keeps what it measured, not its weights.
        """
        state: dict[str, Any] = {"epoch": self.epoch, "curves": asdict(self.curves)}
        if not self.done:
            state["model"] = self.model.state_dict()
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken: by this task, or by the one that it branches off."""
        self.epoch = state["epoch"]
        self.curves = Curves(**state["curves"])
        if not self.done:
            self._take_form_of(max(0, self.epoch - 1))
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
