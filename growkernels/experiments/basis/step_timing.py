"""Wall time of layers and of whole training steps, in one process, taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.experiments.basis.plans import candidate_layers
from growkernels.experiments.basis.settings import DENSE, Recipe, StepTiming
from growkernels.experiments.basis.training import Plan
from growkernels.experiments.models.resnet import resnet18
from growkernels.experiments.seeds import seeded
from growkernels.growth.basis_search import BasisSearch, LayerTimes
from growkernels.nn import convert
from growkernels.timing import interleaved_seconds

WARM_UP = 2


@dataclass(frozen=True)
class StepTime:
    """Median milliseconds of a step, and its time relative to dense in the same round.

    ``ratio`` is (lower quartile, median, upper quartile) over the rounds.
    """

    milliseconds: float
    ratio: tuple[float, float, float]


def time_steps(
    plans: Mapping[str, Plan], timing: StepTiming, recipe: Recipe, classes: int, device: str
) -> dict[str, StepTime]:
    """Forward, backward and SGD on one batch of noise; ``plans`` are for the timed network.

    ``plans`` holds DENSE, whose plan is empty. All threads that torch has here are used.
    """
    place = torch.device(device)
    images = timed_images(timing, device)
    labels = torch.randint(classes, (timing.batch,), generator=seeded(2), device="cpu").to(place)
    networks = {}
    for name, plan in plans.items():
        model = timed_network(timing, classes, device)
        convert(model, plan)
        # A rate of zero: the values stay those of an untrained network, the work is the same.
        optimizer = torch.optim.SGD(
            model.parameters(), 0.0, recipe.momentum, weight_decay=recipe.weight_decay
        )
        networks[name] = model, optimizer

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(place.type, torch.bfloat16, enabled=recipe.autocast):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    steps = {name: partial(step, *network) for name, network in networks.items()}
    seconds = interleaved_seconds(steps, timing.rounds, place, warm_up=WARM_UP)
    result = {}
    for name, spent in seconds.items():
        ratios = sorted(a / b for a, b in zip(spent, seconds[DENSE], strict=True))
        quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
        result[name] = StepTime(
            1e3 * statistics.median(spent), (quartiles[0], quartiles[1], quartiles[2])
        )
    return result


def measure_layers(
    timing: StepTiming, fractions: Sequence[float], classes: int, autocast: bool, device: str
) -> LayerTimes:
    """Seconds of every candidate layer of the timed network, in full and with each R."""
    model = timed_network(timing, classes, device)
    search = BasisSearch(model, fractions, candidate_layers(model))
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
        return search.times(timed_images(timing, device), timing.layer_rounds)


def timed_network(timing: StepTiming, classes: int, device: str) -> nn.Module:
    model = resnet18(classes, width=timing.width, generator=seeded(0))
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def timed_images(timing: StepTiming, device: str) -> Tensor:
    """A batch of noise in channels_last layout."""
    shape = (timing.batch, 3, timing.image_size, timing.image_size)
    images = torch.randn(shape, generator=seeded(1), device="cpu").to(device)
    return images.contiguous(memory_format=torch.channels_last)
