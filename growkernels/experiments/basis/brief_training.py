"""The short trainings of the layer search, in worker processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import nn

from growkernels.data.images import ImageData
from growkernels.experiments.basis.settings import BasisSettings, Recipe
from growkernels.experiments.basis.sgd import ImageTraining
from growkernels.experiments.seeds import seeded
from growkernels.experiments.worker_pool import Report, run_parts

HELD_OUT = 10  # what a generator is for


def search_data(data: ImageData, validation: int) -> ImageData:
    """Training images alone: ``validation`` of them, a quarter at most, become the test images."""
    validation = max(1, min(validation, len(data.train_labels) // 4))
    order = torch.randperm(len(data.train_labels), generator=seeded(HELD_OUT))
    train, held_out = order[:-validation], order[-validation:]
    return replace(
        data,
        train_images=data.train_images[train],
        train_labels=data.train_labels[train],
        test_images=data.train_images[held_out],
        test_labels=data.train_labels[held_out],
    )


@dataclass(frozen=True)
class BriefTraining:
    """What the search by training does to a model; travels to worker processes by pickle."""

    recipe: Recipe
    epochs: int
    device: str
    name: str
    classes: tuple[str, ...]
    arrays: tuple[numpy.ndarray, ...]

    @property
    def images(self) -> ImageTraining:
        data = ImageData(self.name, self.classes, *map(torch.from_numpy, self.arrays))
        return ImageTraining(self.recipe, self.epochs, data, self.device)

    def build(self, generator: torch.Generator) -> nn.Module:
        return self.images.new_network(generator)

    def __call__(self, model: nn.Module, generator: torch.Generator) -> float:
        """Train; the accuracy on the held-out images, in percentage points."""
        torch.backends.cudnn.deterministic = True
        images = self.images
        optimizer = images.new_optimizer(model)
        for epoch in range(self.epochs):
            images.train_epoch(model, optimizer, epoch, generator)
        return images.test(model)[1]


def brief_training(settings: BasisSettings, data: ImageData, device: str) -> BriefTraining:
    held = search_data(data, settings.validation_images)
    tensors = (held.train_images, held.train_labels, held.test_images, held.test_labels)
    arrays = tuple(tensor.numpy() for tensor in tensors)
    return BriefTraining(
        settings.recipe, settings.search_epochs, device, held.name, held.classes, arrays
    )


@dataclass(frozen=True)
class PoolMap:
    """``map`` over the worker pool, outcomes in the order in which they come."""

    workers: int

    def __call__(self, function: Callable[[Any], Any], parts: Iterable[Any]) -> Iterator[Any]:
        for kind, _, result in run_parts(Reporting(function), list(parts), self.workers):
            if kind == "done":
                yield result


@dataclass(frozen=True)
class Reporting:
    """A function of one argument as work of the pool."""

    function: Callable[[Any], Any]

    def __call__(self, part: Any, report: Report) -> Any:
        return self.function(part)
