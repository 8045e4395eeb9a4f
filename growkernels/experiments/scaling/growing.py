"""One growth step of the study: the driver's, or an even one for comparison, with its times."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels.experiments.scaling.settings import Growth
from growkernels.growth import NeuronScaling
from growkernels.growth.neuron_scaling import Scores, Selection
from growkernels.growth.same_function import outputs_in_eval_mode
from growkernels.timing import now

CHECKED = 64  # images that the function is compared on


@dataclass(frozen=True)
class GrowthStep:
    """One growth, before ``epoch``. Lists have one entry per layer, in the order of ``layers``.

    ``scores`` are those of every neuron (splitting: its smallest eigenvalue), ``added`` counts the
    neurons that were grown. ``change`` is the largest difference of outputs before and after,
    relative to the largest output. Seconds: of collecting inputs and gradients, of the scores
    (eigenpairs, where the criterion needs them), and of selection and surgery.
    """

    epoch: int
    budget: int
    layers: list[str]
    scores: list[list[float]]
    added: list[int]
    parameters: int
    change: float
    collect_seconds: float
    score_seconds: float
    surgery_seconds: float

    @property
    def seconds(self) -> float:
        return self.collect_seconds + self.score_seconds + self.surgery_seconds


def root(layer: str) -> str:
    """The layer of the base network that a grown layer is a part of."""
    return layer.partition(".branches.")[0]


def grow(
    model: nn.Module,
    optimizer: Optimizer,
    growth: Growth,
    batches: Sequence[tuple[Tensor, Tensor]],
    loss_function: Callable[[Tensor, Tensor], Tensor],
    *,
    epoch: int,
    budget: int,
    rows: int,
    eligible: int,
    generator: torch.Generator,
) -> GrowthStep | None:
    """Grow by up to ``budget`` parameters; None where nothing can be grown.

    Inputs and gradients are collected over ``batches`` of (images, targets) without an update, of
    which every layer keeps ``rows``; ``eligible`` neurons with a score below 0 open a layer.
    """
    if budget < cost_of_neuron(model.get_submodule("blocks.0.attn.q"), growth):
        return None
    device = batches[0][0].device
    clock = [now(device)]
    even = growth.criterion == "uniform"
    scaling = NeuronScaling(
        model,
        "random" if even else growth.criterion,
        form=growth.form,
        rows=rows,
        generator=generator,
    )
    try:
        for images, targets in batches:
            with scaling.recording():
                loss_function(model(images), targets).backward()
        optimizer.zero_grad(set_to_none=True)
        clock.append(now(device))
        scores = scaling.scores()
        clock.append(now(device))
        if even:
            chosen = even_selection(model, scores, growth, budget)
        else:
            chosen = scaling.select(scores, budget, eligible)
        if not chosen:
            return None
        started = now(device)
        sample = batches[0][0][:CHECKED]
        (before,) = outputs_in_eval_mode(model, sample)
        checked = now(device) - started
        scaling.grow(chosen, optimizer, init=growth.direction)
        clock.append(now(device) - checked)
        change = outputs_in_eval_mode(model, sample)[0] - before
    finally:
        scaling.close()
    return GrowthStep(
        epoch=epoch,
        budget=budget,
        layers=list(scores.values),
        scores=[values.tolist() for values in scores.values.values()],
        added=[len(chosen.neurons.get(name, ())) for name in scores.values],
        parameters=chosen.parameters,
        change=float(change.abs().max() / before.abs().max()),
        collect_seconds=clock[1] - clock[0],
        score_seconds=clock[2] - clock[1],
        surgery_seconds=clock[3] - clock[2],
    )


def cost_of_neuron(layer: nn.Module, growth: Growth) -> int:
    """Parameters that growing one neuron of a linear layer adds: a pair, or one with its gate."""
    assert isinstance(layer, nn.Linear)
    inputs = layer.in_features + 1
    return 2 * inputs if growth.form == "pair" else inputs + 1


def even_selection(model: nn.Module, scores: Scores, growth: Growth, budget: int) -> Selection:
    """Neurons by ``scores``, as equal a share in every layer of the base network as can be."""
    costs, sizes = {}, {}
    for name in scores.values:
        if root(name) == name:
            costs[name] = cost_of_neuron(model.get_submodule(name), growth)
            sizes[name] = len(scores.values[name])
    counts = dict.fromkeys(costs, 0)
    queue = [(0.0, number, name) for number, name in enumerate(costs)]
    spent = 0
    while queue:
        _, number, name = heapq.heappop(queue)
        if spent + costs[name] > budget or counts[name] == sizes[name]:
            continue  # and never again: costs stay
        spent += costs[name]
        counts[name] += 1
        heapq.heappush(queue, (counts[name] / sizes[name], number, name))
    neurons = {
        name: tuple(sorted(scores.values[name].argsort(stable=True)[:count].tolist()))
        for name, count in counts.items()
        if count
    }
    return Selection(neurons, spent, scores, "The same share of every layer.")
