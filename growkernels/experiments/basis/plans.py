"""Which layers become basis convolutions: the variants' plans, from costs and measured times."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from growkernels.experiments.basis.settings import (
    BY_TAYLOR,
    BY_TRAINING,
    EVERYWHERE,
    BasisSettings,
)
from growkernels.experiments.basis.training import Plan
from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities
from growkernels.nn import convert


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
    measured, ratio = (times, 1 - settings.kept_saving * saving) if saving > 0 else (None, None)
    target = ratio or 1 - settings.kept_saving * _saved_parameters(model, everywhere)
    return ratio, {
        EVERYWHERE: everywhere,
        BY_TRAINING: paper.plan(by_training, measured, ratio=target),
        BY_TAYLOR: ours.plan(by_taylor, measured, ratio=target),
    }


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
