"""The trainings of the study: ResNet-18 by a recipe, as full or as basis convolutions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.experiments.basis.settings import BasisSettings, Recipe
from growkernels.experiments.image_training import Test, evaluate, in_batches, train_epoch
from growkernels.experiments.images.augment import Normalise, random_crop_flip
from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.images.upload import upload
from growkernels.experiments.models.resnet import resnet18
from growkernels.experiments.seeds import seeded
from growkernels.experiments.study import Result
from growkernels.growth.basis_search import SkipSchedule
from growkernels.timing import now

Plan = dict[str, int]  # module path -> number of basis filters

# What a generator is for, so that no two draw the same numbers.
INITIAL_VALUES, TRAINING_ORDER = range(2)


class ImageTraining:
    """Training as a recipe says, ``epochs`` long, on the training images of ``data``."""

    def __init__(self, recipe: Recipe, epochs: int, data: ImageData, device: str) -> None:
        self.recipe = recipe
        self.epochs = epochs
        self.device = torch.device(device)
        self.data = data.to(self.device)
        self.normalise = Normalise(self.device)
        # A smaller last batch is left out, unless it is the only one.
        self.batch = min(recipe.batch, len(data.train_labels))
        self.steps_per_epoch = len(data.train_labels) // self.batch

    def new_network(self, generator: torch.Generator) -> nn.Module:
        """A dense ResNet-18 in channels_last layout."""
        model = resnet18(len(self.data.classes), width=self.recipe.width, generator=generator)
        model.to(device=self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def new_optimizer(self, model: nn.Module) -> torch.optim.SGD:
        recipe = self.recipe
        return torch.optim.SGD(
            model.parameters(), recipe.rate, recipe.momentum, weight_decay=recipe.weight_decay
        )

    def train_epoch(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epoch: int,
        generator: torch.Generator,
    ) -> float:
        """One pass over the images, cropped, mirrored and ordered by the generator; mean loss.

        ``epoch`` is counted from 0; it says where on its cosine the learning rate is.
        """
        return train_epoch(
            model,
            optimizer,
            self._batches(generator),
            self.device,
            rate=lambda step: self._rate(epoch * self.steps_per_epoch + step),
            autocast=self.recipe.autocast,
        )

    def _batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        images = random_crop_flip(self.data.train_images, generator, self.recipe.crop_padding)
        order = upload(torch.randperm(len(images), generator=generator, device="cpu"), self.device)
        for index in order[: self.steps_per_epoch * self.batch].split(self.batch):
            yield self.normalise(images[index]), self.data.train_labels[index]

    def _rate(self, step: int) -> float:
        progress = step / (self.epochs * self.steps_per_epoch)
        return self.recipe.rate * 0.5 * (1 + math.cos(math.pi * progress))

    def test(self, model: nn.Module) -> Test:
        batches = in_batches(self.data.test_images, self.data.test_labels, self.normalise)
        return evaluate(model, batches, self.device, self.recipe.autocast)


class BasisTraining:
    """A stretch of one run, in the form that a schedule gives the network.

    Runs of one number start from the same dense network and see the same images in the same order:
    all randomness is a function of (the study's seed, the run, the epoch), so a restored training
    continues exactly as it would have.
    """

    def __init__(
        self,
        settings: BasisSettings,
        data: ImageData,
        device: str,
        run: int,
        schedule: SkipSchedule,
        plan: Plan,
    ) -> None:
        self.seed = settings.seed
        self.run = run
        self.images = ImageTraining(settings.recipe, settings.epochs, data, device)
        self.schedule, self.plan = schedule, plan
        self.epoch = 0
        names = ("loss", "test_loss", "accuracy", "seconds")
        self.measured: dict[str, Any] = {"steps": {name: [] for name in names}}
        self.model = self.images.new_network(seeded(self.seed, run, INITIAL_VALUES))
        self.optimizer = self.images.new_optimizer(self.model)
        self._take_form_of(0)

    def advance(self, step: int) -> None:
        """One epoch of training, then the test."""
        self._take_form_of(step)
        generator = seeded(self.seed, self.run, TRAINING_ORDER, step)
        start = now(self.images.device)
        loss = self.images.train_epoch(self.model, self.optimizer, step, generator)
        seconds = now(self.images.device) - start
        test = self.images.test(self.model)
        new = {"loss": loss, "test_loss": test.loss, "accuracy": test.accuracy, "seconds": seconds}
        for name, value in new.items():
            self.measured["steps"][name].append(value)
        self.epoch = step + 1

    def _take_form_of(self, epoch: int) -> None:
        """Full or basis convolutions, as the schedule has them in this epoch."""
        self.schedule.switch(epoch, self.model, self.plan, self.optimizer)

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, stored: Result, *, own: bool) -> None:
        """Go on with a state of this stretch (``own``), or of the one before it."""
        if own:
            self.measured = stored.measured
        self.epoch = stored.state["epoch"]
        self._take_form_of(max(0, self.epoch - 1))
        self.model.load_state_dict(stored.state["model"])
        self.optimizer.load_state_dict(stored.state["optimizer"])
