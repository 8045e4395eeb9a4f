"""The layer search by both methods, and the plans that each of them gives."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from growkernels.data.images import ImageData
from growkernels.experiments.basis.brief_training import PoolMap, brief_training
from growkernels.experiments.basis.plans import candidate_layers, make_plans, scaled_times
from growkernels.experiments.basis.settings import (
    BasisSettings,
)
from growkernels.experiments.basis.step_timing import measure_layers
from growkernels.experiments.basis.training import Plan
from growkernels.experiments.run_folder import StateStore
from growkernels.experiments.seeds import seeded
from growkernels.experiments.worker_pool import available_cores
from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities
from growkernels.models.resnet import resnet18

FIRST_SEARCH_SEED = 1000  # the search's starts are none of the final trainings'
CALIBRATION, DRAWN_LABELS = range(11, 13)  # what a generator is for
Progress = Callable[[int, int], None]


def sensitivity_by_training(
    settings: BasisSettings, data: ImageData, device: str, results: Path, progress: Progress
) -> Sensitivities:
    """The paper's search at one fraction; each finished training is stored in ``results``."""
    training = brief_training(settings, data, device)
    model = training.build(seeded(settings.seed))
    search = BasisSearch(model, (settings.fraction,), candidate_layers(model))
    workers = available_cores() if torch.device(device).type == "cpu" else 1
    return search.sensitivities(
        "train",
        train=training,
        build=training.build,
        seeds=range(FIRST_SEARCH_SEED, FIRST_SEARCH_SEED + settings.search_runs),
        results=results,
        map_trials=PoolMap(workers),
        progress=progress,
    )


def sensitivity_by_taylor(
    settings: BasisSettings, data: ImageData, device: str
) -> tuple[Sensitivities, float]:
    """Our search at all fractions, and the seconds of the training before it.

    The network is the one that the search by training compares with, of its first start.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers that search by training
    try:
        training = brief_training(settings, data, device)
        generator = torch.Generator().manual_seed(FIRST_SEARCH_SEED)
        started = time.perf_counter()
        model = training.build(generator)
        training(model, generator)
        seconds = time.perf_counter() - started
        images = training.images
        chosen = torch.randperm(len(images.data.train_labels), generator=seeded(CALIBRATION))
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
    settings: BasisSettings, data: ImageData, device: str, states: StateStore, progress: Progress
) -> Search:
    """Both searches and the plans; parts that are in ``states`` already are taken from there.

    Measured times differ from run to run, and plans depend on them: hence they are stored first.
    """
    recipe, timing, classes = settings.recipe, settings.timing, len(data.classes)

    def stored(name: str, compute: Callable[[], Any]) -> Any:
        if (found := states.load(name)) is None:
            found = compute()
            states.save(name, found)
        return found

    times = LayerTimes(
        **stored(
            "layer-times",
            lambda: asdict(
                measure_layers(timing, settings.fractions, classes, recipe.autocast, device)
            ),
        )
    )
    times = scaled_times(times, timing.width, recipe.width)
    by_training = sensitivity_by_training(
        settings, data, device, states.path / "search-trainings.jsonl", progress
    )

    def taylor() -> dict[str, Any]:
        sensitivities, seconds = sensitivity_by_taylor(settings, data, device)
        return {"sensitivities": asdict(sensitivities), "seconds": seconds}

    found = stored("search-taylor", taylor)
    by_taylor = Sensitivities(**found["sensitivities"])
    model = resnet18(classes, width=recipe.width, generator=seeded(0))
    ratio, plans = make_plans(settings, model, times, by_training, by_taylor)
    return Search(times, by_training, by_taylor, found["seconds"], ratio, plans)
