"""Which layers become basis convolutions: the variants' plans, from costs and measured times."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from growkernels.experiments.basis.settings import (
    BY_CHANCE,
    BY_TAYLOR,
    BY_TRAINING,
    EVERYWHERE,
    ONE_FRACTION,
    BasisSettings,
)
from growkernels.experiments.basis.training import Plan
from growkernels.experiments.seeds import seeded
from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities
from growkernels.nn import convert

DEALT = 13  # what a generator is for, beside those of the search


def candidate_layers(model: nn.Module) -> list[str]:
    """All 3x3 convolutions but the stem."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and path != "conv1"
    ]


def make_plans(
    settings: BasisSettings,
    model: nn.Module,
    times: LayerTimes,
    by_training: Sensitivities,
    by_taylor: Sensitivities,
) -> tuple[float | None, dict[str, Plan]]:
    """The target, and the plans of the variants that have one."""
    layers = candidate_layers(model)
    paper, ours = (
        BasisSearch(model, fractions, layers)
        for fractions in ((settings.fraction,), settings.fractions)
    )
    everywhere = {path: ranks[0] for path, ranks in paper.candidates.items()}
    saving = sum(times.saving(path, rank) for path, rank in everywhere.items()) / times.step
    # What was measured beside other work may be no saving, or more than the whole step.
    told = 0 < saving < 1
    measured, ratio = (times, 1 - settings.kept_saving * saving) if told else (None, None)
    target = ratio or 1 - settings.kept_saving * _saved_parameters(model, everywhere)
    return ratio, {
        EVERYWHERE: everywhere,
        BY_TRAINING: paper.plan(by_training, measured, ratio=target),
        BY_TAYLOR: ours.plan(by_taylor, measured, ratio=target),
        ONE_FRACTION: paper.plan(_at_ranks(by_taylor, everywhere), measured, ratio=target),
        BY_CHANCE: paper.plan(_dealt(by_training, settings.seed), measured, ratio=target),
    }


def _at_ranks(found: Sensitivities, ranks: Plan) -> Sensitivities:
    """The costs of one number of basis filters per layer; of the most there is, if not of that."""
    costs = {
        path: {rank: of_layer.get(rank, of_layer[max(of_layer)])}
        for path, rank in ranks.items()
        for of_layer in [found.costs[path]]
    }
    return replace(found, costs=costs)


def _dealt(found: Sensitivities, seed: int) -> Sensitivities:
    """The same costs, dealt out to the layers at random."""
    costs = [next(iter(of_layer.values())) for of_layer in found.costs.values()]
    order = torch.randperm(len(costs), generator=seeded(seed, DEALT), device="cpu").tolist()
    return replace(
        found,
        costs={
            path: {rank: costs[place]}
            for (path, of_layer), place in zip(found.costs.items(), order, strict=True)
            for rank in of_layer
        },
    )


def parameter_count(model: nn.Module, plan: Plan) -> int:
    """Of the model converted by the plan."""
    converted = copy.deepcopy(model)
    convert(converted, plan)
    return sum(p.numel() for p in converted.parameters())


def _saved_parameters(model: nn.Module, plan: Plan) -> float:
    return 1 - parameter_count(model, plan) / parameter_count(model, {})


def scaled_plan(plan: Mapping[str, int], width: int, to_width: int) -> Plan:
    """The same fractions of basis filters in a network of another width."""
    return {path: max(1, round(rank * to_width / width)) for path, rank in plan.items()}


def scaled_times(times: LayerTimes, width: int, to_width: int) -> LayerTimes:
    """Times measured at one width, under the numbers of basis filters of another."""
    return replace(
        times,
        basis={
            path: {max(1, round(rank * to_width / width)): s for rank, s in seconds.items()}
            for path, seconds in times.basis.items()
        },
    )
