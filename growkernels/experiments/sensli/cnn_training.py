"""The trainings of the CNN study: a small VGG, with layers inserted where the merits say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from growkernels.experiments.image_training import evaluate, in_batches, train_epoch
from growkernels.experiments.images.augment import Normalise, random_crop_flip
from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.images.upload import upload
from growkernels.experiments.models.vgg import layers_per_stage, vgg
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli.cnn_merits import (
    PassTimes,
    attempt_insertion,
    time_passes,
    training_flops,
)
from growkernels.experiments.sensli.cnn_settings import CnnSetting, Rule
from growkernels.experiments.study import Result
from growkernels.growth import insertions, rebuild
from growkernels.timing import now

# What a generator is for, so that no two draw the same numbers.
INITIAL_VALUES, TRAINING_ORDER, MERIT_ORDER, RANDOM_POSITION = range(4)


class CnnTraining:
    """A stretch of one run of a setting, from networks of ``layers`` convolutions per stage.

    All randomness is a function of (setting's seed, run, epoch), the same for every variant, so a
    restored training continues exactly as it would have, and variants differ in nothing but what
    is compared. Every run has its own initial values (the authors' runs share one vector). A final
    architecture that is trained from scratch has draws of its own, those of ``phase`` 1.

    Measured are, per epoch, "loss" (the mean over the training images), "test_loss" and "error"
    (percent) after it, and "seconds" of training alone; besides "parameters", "flops" (per image),
    "layers" per stage and the "merit_pass" at its beginning.
    """

    def __init__(
        self,
        setting: CnnSetting,
        run: int,
        data: ImageData,
        device: str,
        layers: tuple[int, ...],
        phase: int = 0,
    ) -> None:
        self.setting, self.run, self.phase = setting, run, phase
        self.device = torch.device(device)
        self.data = data.to(self.device)
        self.normalise = Normalise(self.device)
        self.layers = layers
        self.model = self._new_model(layers)
        self.optimizer = setting.optimizer.build(self.model)
        names = ("loss", "test_loss", "error", "seconds")
        self.measured: dict[str, Any] = {"steps": {name: [] for name in names}, "merit_pass": None}
        self._describe()

    def _describe(self) -> None:
        sample = self.normalise(self.data.train_images[:2])
        self.measured |= {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "flops": training_flops(self.model, sample),
            "layers": list(layers_per_stage(self.model)),
        }

    def _new_model(self, layers: tuple[int, ...]) -> nn.Sequential:
        setting = self.setting
        model = vgg(
            setting.widths,
            layers,
            classes=len(self.data.classes),
            image_size=self.data.train_images.shape[-1],
            head_width=setting.head_width,
            generator=seeded(setting.seed, self.run, INITIAL_VALUES, *layers),
        )
        return model.to(self.device)

    def advance(self, step: int) -> None:
        """One epoch of training, then the test."""
        images, order = self.epoch_images(TRAINING_ORDER, step)
        start = now(self.device)
        batches = self._batches(images, order.split(self.setting.batch))
        loss = train_epoch(self.model, self.optimizer, batches, self.device, by_image=True)
        seconds = now(self.device) - start
        test = evaluate(
            self.model,
            in_batches(self.data.test_images, self.data.test_labels, self.normalise),
            self.device,
        )
        values = (loss, test.loss, test.error, seconds)
        for of_steps, value in zip(self.measured["steps"].values(), values, strict=True):
            of_steps.append(value)

    def attempt(self, rule: Rule, epoch: int) -> None:
        """One merit pass, and what the rule makes of it."""
        merit_pass = attempt_insertion(
            self.model,
            self.optimizer,
            lambda: self.merit_batches(epoch),
            rule,
            epoch,
            seeded(self.setting.seed, self.run, RANDOM_POSITION, epoch),
        )
        self.measured["merit_pass"] = asdict(merit_pass)
        self._describe()

    def epoch_images(self, purpose: int, epoch: int) -> tuple[Tensor, Tensor]:
        """The training images as this epoch crops and mirrors them, and their order."""
        generator = seeded(self.setting.seed, self.run, purpose, self.phase, epoch)
        images = random_crop_flip(self.data.train_images, generator)
        return images, upload(
            torch.randperm(len(images), generator=generator, device="cpu"), self.device
        )

    def merit_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training images in batches of one size; a smaller last one is left."""
        images, order = self.epoch_images(MERIT_ORDER, epoch)
        size = min(self.setting.batch, len(order))
        return self._batches(images, order[: len(order) // size * size].split(size))

    def _batches(self, images: Tensor, order: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order:
            yield self.normalise(images[index]), self.data.train_labels[index]

    def time_merit_passes(self, batches: int = 20) -> PassTimes:
        """Our merit pass and the authors' on this network."""
        return time_passes(self.model, lambda: islice(self.merit_batches(0), batches))

    def state(self) -> dict[str, Any]:
        return {
            "layers": list(self.layers),
            "insertions": insertions(self.model),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, stored: Result, *, own: bool) -> None:
        """Go on with a state of this stretch (``own``), or of the one before it."""
        state = stored.state
        self.layers = tuple(state["layers"])
        self.model = self._new_model(self.layers)
        self.optimizer = self.setting.optimizer.build(self.model)
        rebuild(self.model, state["insertions"], self.optimizer)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if own:
            self.measured = stored.measured
        else:
            self._describe()


class Nothing:
    """What trains a final architecture that is nothing new, because no layer was inserted."""

    def __init__(self) -> None:
        self.measured: dict[str, Any] = {"steps": {}}

    def advance(self, step: int) -> None:
        """There is nothing to do."""

    def state(self) -> None:
        return None
