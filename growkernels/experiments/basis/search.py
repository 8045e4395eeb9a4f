"""The layer search by both methods, and the plans that each of them gives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from growkernels.experiments.basis.plans import candidate_layers, make_plans, scaled_times
from growkernels.experiments.basis.settings import BasisSettings
from growkernels.experiments.basis.step_timing import measure_layers
from growkernels.experiments.basis.training import ImageTraining, Plan
from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.images.store import ImageSource
from growkernels.experiments.models.resnet import resnet18
from growkernels.experiments.pool import Report, run_parts, workers_on
from growkernels.experiments.run_folder import StateStore
from growkernels.experiments.seeds import seeded
from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities

FIRST_SEARCH_SEED = 1000  # the search's starts are none of the final trainings'
HELD_OUT, CALIBRATION, DRAWN_LABELS = range(10, 13)  # what a generator is for
Progress = Callable[[int, int], None]


def search_data(data: ImageData, validation: int) -> ImageData:
    """Training images alone: ``validation`` of them, a quarter at most, become the test images."""
    validation = max(1, min(validation, len(data.train_labels) // 4))
    order = torch.randperm(len(data.train_labels), generator=seeded(HELD_OUT), device="cpu")
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

    settings: BasisSettings
    source: ImageSource

    def images(self) -> ImageTraining:
        settings = self.settings
        data = search_data(self.source.images, settings.validation_images)
        return ImageTraining(settings.recipe, settings.search_epochs, data, self.source.device)

    def build(self, generator: torch.Generator) -> nn.Module:
        return self.images().new_network(generator)

    def __call__(self, model: nn.Module, generator: torch.Generator) -> float:
        """Train; the accuracy on the held-out images, in percentage points."""
        torch.backends.cudnn.deterministic = True
        images = self.images()
        optimizer = images.new_optimizer(model)
        for epoch in range(images.epochs):
            images.train_epoch(model, optimizer, epoch, generator)
        return images.test(model).accuracy


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


def sensitivity_by_training(
    settings: BasisSettings, source: ImageSource, results: Path, progress: Progress
) -> Sensitivities:
    """The paper's search at one fraction; each finished training is stored in ``results``."""
    training = BriefTraining(settings, source)
    model = training.build(seeded(settings.seed))
    search = BasisSearch(model, (settings.fraction,), candidate_layers(model))
    return search.sensitivities(
        "train",
        train=training,
        build=training.build,
        seeds=range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + settings.search_runs),
        results=results,
        map_trials=PoolMap(workers_on(source.device)),
        progress=progress,
    )


def sensitivity_by_taylor(
    settings: BasisSettings, source: ImageSource
) -> tuple[Sensitivities, float]:
    """Our search at all fractions, and the seconds of the training before it.

    The network is the one that the search by training compares with, of its first start.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers that search by training
    try:
        training = BriefTraining(settings, source)
        generator = torch.Generator().manual_seed(FIRST_SEARCH_SEED)
        started = time.perf_counter()
        model = training.build(generator)
        training(model, generator)
        seconds = time.perf_counter() - started
        images = training.images()
        chosen = torch.randperm(
            len(images.data.train_labels), generator=seeded(CALIBRATION), device="cpu"
        )
        chosen = chosen[: settings.calibration_images].to(images.device)
        batches = [
            (images.normalise(images.data.train_images[index]), images.data.train_labels[index])
            for index in chosen.split(images.batch)
        ]
        search = BasisSearch(model, settings.fractions, candidate_layers(model))
        generator = seeded(DRAWN_LABELS)
        return search.sensitivities("taylor", batches=batches, generator=generator), seconds
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Search:
    """What the search found. Numbers of basis filters are those of the network that is trained.

    ``ratio`` is the target of the two methods' plans: time of a step relative to the dense
    network's; None where basis convolutions everywhere save no time on this machine, so that the
    plans save parameters instead. ``taylor_training_seconds`` come on top of ``by_taylor.seconds``.
    """

    times: LayerTimes
    by_training: Sensitivities
    by_taylor: Sensitivities
    taylor_training_seconds: float
    ratio: float | None
    plans: dict[str, Plan]


def run_search(
    settings: BasisSettings, source: ImageSource, states: StateStore, progress: Progress
) -> Search:
    """Both searches and the plans; parts that are in ``states`` already are taken from there.

    Measured times differ from run to run, and plans depend on them: hence they are stored first.
    """
    recipe, timing, classes = settings.recipe, settings.timing, source.about["classes"]
    times = states.computed(
        "layer-times",
        lambda: asdict(
            measure_layers(timing, settings.fractions, classes, recipe.autocast, source.device)
        ),
        lambda state: scaled_times(LayerTimes(**state), timing.width, recipe.width),
    )
    by_training = sensitivity_by_training(
        settings, source, states.path / "search-trainings.jsonl", progress
    )

    def taylor() -> dict[str, Any]:
        sensitivities, seconds = sensitivity_by_taylor(settings, source)
        return {"sensitivities": asdict(sensitivities), "seconds": seconds}

    by_taylor, seconds = states.computed(
        "search-taylor",
        taylor,
        lambda state: (Sensitivities(**state["sensitivities"]), float(state["seconds"])),
    )
    model = resnet18(classes, width=recipe.width, generator=seeded(0))
    ratio, plans = make_plans(settings, model, times, by_training, by_taylor)
    return Search(times, by_training, by_taylor, seconds, ratio, plans)
