"""The trainings of the study: a DeiT by its recipe, epoch by epoch, growing when it is due."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from growkernels.experiments.image_training import evaluate, train_epoch
from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.models.deit import DeiT, deit
from growkernels.experiments.scaling.growing import GrowthStep, grow
from growkernels.experiments.scaling.recipe import Batches, build_optimizer, learning_rate
from growkernels.experiments.scaling.settings import Setting, Variant
from growkernels.experiments.seeds import seeded
from growkernels.experiments.study import Result
from growkernels.growth import insertions, rebuild
from growkernels.growth.neuron_scaling import forward_flops
from growkernels.timing import now

# What a generator is for, so that no two draw the same numbers.
INITIAL_VALUES, TRAINING, DROPPED_PATHS, GROWTH_BATCHES, GROWTH_CHOICE = range(5)
DEIT_S_WIDTH = 384


class ScalingTraining:
    """A stretch of one variant in one run.

    All randomness is a function of (the setting's seed, run, epoch), the same for every variant,
    so a restored run continues exactly as it would have, and variants differ in nothing but what
    is compared.

    Measured are, per epoch, "loss" (the mean over its training batches, of mixed images and
    smoothed labels where the recipe mixes and smooths), "test_loss", "top1" and "top5" (accuracies
    in percent; None after an epoch without a test), "parameters" and "seconds" (of training alone);
    besides, "growth" has every `GrowthStep` and "flops" the last network's forward operations.
    """

    def __init__(
        self, setting: Setting, variant: Variant, run: int, data: ImageData, device: str = "cpu"
    ) -> None:
        self.setting = setting
        self.variant = variant
        self.run = run
        self.device = torch.device(device)
        self.batches = Batches(data, setting.recipe, setting.architecture.image_size)
        self.classes = len(data.classes)
        self.model = self._new_model()
        self.optimizer = build_optimizer(setting.recipe, self.model)
        names = ("loss", "test_loss", "top1", "top5", "parameters", "seconds")
        self.measured: dict[str, Any] = {
            "steps": {name: [] for name in names},
            "growth": [],
            "flops": self._flops(),
        }

    def advance(self, step: int) -> None:
        """One epoch: a growth if it is due, then training and test."""
        due = self.setting.growth_epochs(self.variant)
        if step in due:
            grown = self._grow(step, [e for e in due if e >= step])
            if grown is not None:
                self.measured["growth"].append(asdict(grown))
                self.measured["flops"] = self._flops()
        started = now(self.device)
        loss = self._train_epoch(step)
        seconds = now(self.device) - started
        test_loss = top1 = top5 = None
        if self.setting.tests_after(step):
            test = evaluate(self.model, self.batches.test(), self.device, self._autocast)
            test_loss, top1, top5 = test.loss, test.accuracy, test.accuracy_of_five
        values = (loss, test_loss, top1, top5, self._parameters(), seconds)
        for of_steps, value in zip(self.measured["steps"].values(), values, strict=True):
            of_steps.append(value)

    def _new_model(self) -> DeiT:
        architecture, recipe = self.setting.architecture, self.setting.recipe
        attention, hidden = architecture.widths(self.variant.start)
        model = deit(
            embed=architecture.embed,
            depth=architecture.depth,
            heads=architecture.heads,
            attention_width=attention,
            mlp_width=hidden,
            patch=architecture.patch,
            image_size=architecture.image_size,
            classes=self.classes,
            drop_path=recipe.drop_path,
            generator=seeded(self.setting.seed, self.run, INITIAL_VALUES),
        )
        # DeiT's standard deviation is made for its width of 384; signals keep their size in others.
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight *= (DEIT_S_WIDTH / architecture.embed) ** 0.5
        return model.to(self.device)

    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _flops(self) -> int:
        """Of one image's forward pass."""
        side = self.setting.architecture.image_size
        return forward_flops(self.model, torch.zeros(1, 3, side, side, device=self.device))

    def _seeded(self, purpose: int, epoch: int) -> torch.Generator:
        return seeded(self.setting.seed, self.run, purpose, epoch)

    def _grow(self, epoch: int, remaining: list[int]) -> GrowthStep | None:
        """Spends this step's part of the parameters that are still missing.

        As in the authors' code it is proportional to the learning rate of the moment, here scaled
        such that all steps together reach the final size.
        """
        growth, recipe, setting = self.variant.growth, self.setting.recipe, self.setting
        assert growth is not None
        rates = [learning_rate(recipe, setting.epochs, e) for e in remaining]
        missing = target_parameters(setting, growth.share, self.classes) - self._parameters()
        self._start_training(epoch)
        batches = self.batches.training(self._seeded(GROWTH_BATCHES, epoch))
        return grow(
            self.model,
            self.optimizer,
            growth,
            list(islice(batches, setting.growth_batches)),
            F.cross_entropy,
            epoch=epoch,
            budget=round(missing * rates[0] / sum(rates)),
            rows=setting.growth_rows,
            eligible=setting.eligible,
            generator=self._seeded(GROWTH_CHOICE, epoch),
        )

    def _start_training(self, epoch: int) -> None:
        self.model.train()
        # Dropped paths come from the global generator.
        torch.manual_seed(self._seeded(DROPPED_PATHS, epoch).initial_seed())

    def _train_epoch(self, epoch: int) -> float:
        recipe, epochs = self.setting.recipe, self.setting.epochs
        self._start_training(epoch)
        count = self.batches.epoch_images() // min(recipe.batch, self.batches.epoch_images())
        return train_epoch(
            self.model,
            self.optimizer,
            self.batches.training(self._seeded(TRAINING, epoch)),
            self.device,
            rate=lambda step: learning_rate(recipe, epochs, epoch + step / count),
            autocast=self._autocast,
        )

    @property
    def _autocast(self) -> bool:
        return self.device.type == "cuda"

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "insertions": insertions(self.model),
        }

    def load(self, stored: Result, *, own: bool) -> None:
        """Go on with a state of this stretch (``own``), or of the one before it."""
        if own:
            self.measured = stored.measured
        self.model = self._new_model()
        self.optimizer = build_optimizer(self.setting.recipe, self.model)
        rebuild(self.model, stored.state["insertions"], self.optimizer)
        self.model.load_state_dict(stored.state["model"])
        self.optimizer.load_state_dict(stored.state["optimizer"])
        self.measured["flops"] = self._flops()


def target_parameters(setting: Setting, share: float, classes: int) -> int:
    """Parameters of a network ``share`` of the way from the reduced to the full size."""
    reduced, full = (
        sum(p.numel() for p in _static(setting, of, classes).parameters()) for of in (0.0, 1.0)
    )
    return round(reduced + share * (full - reduced))


def epochs_of(setting: Setting, variant: Variant, classes: int, train_images: int) -> int:
    """How many epochs the variant is trained for.

    With ``operations_of``: the fewest whose operations are not below those of the grown variant,
    whose network is taken to have those of an evenly scaled one of its size, and whose passes for
    the scores count; the scores' own arithmetic is in its seconds alone.
    """
    if variant.operations_of is None:
        return setting.epochs
    grown = setting.variant(variant.operations_of)
    assert grown.growth is not None
    recipe = setting.recipe
    due = setting.growth_epochs(grown)
    rates = [learning_rate(recipe, setting.epochs, epoch) for epoch in due]
    epoch_images = recipe.epoch_images or train_images
    reduced, full = (_operations(setting, of, classes) for of in (0.0, 1.0))
    total, share = 0.0, 0.0
    for epoch in range(setting.epochs):
        if epoch in due:
            total += setting.growth_batches * recipe.batch * (reduced + share * (full - reduced))
            share += grown.growth.share * rates[due.index(epoch)] / sum(rates)
        total += epoch_images * (reduced + share * (full - reduced))
    return math.ceil(total / (epoch_images * _operations(setting, variant.start, classes)))


@cache
def _operations(setting: Setting, share: float, classes: int) -> int:
    """Of the forward pass of one image."""
    side = setting.architecture.image_size
    image = torch.zeros(1, 3, side, side, device="meta")
    return forward_flops(_static(setting, share, classes), image)


def _static(setting: Setting, share: float, classes: int) -> DeiT:
    """A network without values, evenly ``share`` of the way from the reduced to the full size."""
    architecture = setting.architecture
    attention, hidden = architecture.widths(share)
    with torch.device("meta"):
        return DeiT(
            embed=architecture.embed,
            depth=architecture.depth,
            heads=architecture.heads,
            attention_width=attention,
            mlp_width=hidden,
            patch=architecture.patch,
            image_size=architecture.image_size,
            channels=3,
            classes=classes,
            drop_path=0.0,
        )
