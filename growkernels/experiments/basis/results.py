"""What a finished study measured: curves and final values, costs of the search, times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from growkernels.experiments.basis.plans import parameter_count
from growkernels.experiments.basis.search import Search
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    DENSE,
    EVERYWHERE,
    FULL_FIRST,
    VARIANTS,
    BasisSettings,
)
from growkernels.experiments.basis.step_timing import StepTime
from growkernels.experiments.basis.training import Curves, Plan
from growkernels.experiments.run_folder import number
from growkernels.experiments.statistics import Estimate, difference, estimate, rank_correlation
from growkernels.models.resnet import resnet18


@dataclass(frozen=True)
class Study:
    """Everything that was measured. ``curves[variant]`` has one entry per run.

    ``step_times`` holds the variants that are one network throughout; ``images_per_epoch`` are
    those that an epoch of the timed network's training sees.
    """

    settings: BasisSettings
    data: Mapping[str, Any]
    search: Search
    curves: Mapping[str, Sequence[Curves]]
    step_times: Mapping[str, StepTime]

    def curve(self, variant: str, quantity: str) -> Tensor:
        """[epochs, runs]: "loss", "test_loss", "accuracy" (%) or "seconds"."""
        runs = [getattr(curves, quantity) for curves in self.curves[variant]]
        return torch.tensor(runs, dtype=torch.float64).T

    def final(self, variant: str, quantity: str = "accuracy") -> Tensor:
        """The value after the last epoch, [runs]."""
        return self.curve(variant, quantity)[-1]

    def gain(self, first: str, second: str, quantity: str = "accuracy") -> Estimate:
        """first - second, paired: runs of one number start alike and see the same images."""
        return difference(self.final(first, quantity), self.final(second, quantity), paired=True)

    def plan(self, variant: str) -> Plan:
        """The basis convolutions of a variant; of a skip schedule, where it has any."""
        if variant == DENSE:
            return {}
        skips = (BASIS_FIRST, FULL_FIRST)
        return self.search.plans[EVERYWHERE if variant in skips else variant]

    def time_ratio(self, variant: str) -> tuple[float, float, float]:
        """Time per epoch relative to dense: lower quartile, median, upper quartile.

        That of a skip schedule is the mean over its epochs.
        """
        if variant in self.step_times:
            return self.step_times[variant].ratio
        before = round(self.settings.switch * self.settings.epochs) / self.settings.epochs
        share = before if variant == BASIS_FIRST else 1 - before
        low, middle, high = (1 + share * (r - 1) for r in self.step_times[EVERYWHERE].ratio)
        return low, middle, high

    def epoch_seconds(self, variant: str) -> float:
        """Of the timed network on as many images as are in CIFAR-10's training set."""
        steps = TIMED_IMAGES / self.settings.timing.batch
        dense = steps * self.step_times[DENSE].milliseconds / 1e3
        if variant in self.step_times:
            return steps * self.step_times[variant].milliseconds / 1e3
        return dense * self.time_ratio(variant)[1]


TIMED_IMAGES = 50_000


def agreement(search: Search, share: int, shares: int) -> tuple[float, float]:
    """Rank correlation of the methods over the layers, and its one-sided p-value.

    ``share`` picks the Taylor costs' number of basis filters, the ``share``-th of ``shares``.
    """
    paths = list(search.by_training.costs)
    trained = [next(iter(search.by_training.costs[path].values())) for path in paths]
    predicted = [costs_at(search, path, shares)[share] for path in paths]
    return rank_correlation(torch.tensor(trained), torch.tensor(predicted))


def costs_at(search: Search, path: str, shares: int) -> list[float]:
    """The layer's Taylor costs by ascending fraction; a fraction that saves nothing repeats."""
    costs = [cost for _, cost in sorted(search.by_taylor.costs[path].items())]
    return costs + [costs[-1]] * (shares - len(costs))


def summary_of(study: Study, classes: int) -> dict[str, Any]:
    """Final values and the search, as plain JSON values."""
    model = resnet18(classes, width=study.settings.recipe.width)
    variants = {}
    for variant in VARIANTS:
        accuracy, loss = (estimate(study.final(variant, q)) for q in ("accuracy", "loss"))
        gain = study.gain(variant, DENSE)
        variants[variant] = {
            "accuracy_mean": number(accuracy.mean),
            "accuracy_sem": number(accuracy.sem),
            "accuracy_against_dense_mean": number(gain.mean),
            "accuracy_against_dense_sem": number(gain.sem),
            "loss_mean": number(loss.mean),
            "loss_sem": number(loss.sem),
            "runs": accuracy.count,
            "parameters": parameter_count(model, study.plan(variant)),
            "time_per_epoch_against_dense": [round(r, 4) for r in study.time_ratio(variant)],
            "seconds_per_epoch": round(study.epoch_seconds(variant), 3),
        }
    search = study.search
    shares = len(study.settings.fractions)
    correlations = {}
    for share, fraction in enumerate(study.settings.fractions):
        correlation, chance = agreement(search, share, shares)
        correlations[str(fraction)] = {"spearman": number(correlation), "p": number(chance)}
    return {
        "variants": variants,
        "search": {
            "by_training": _sensitivities(search, "by_training"),
            "by_taylor": _sensitivities(search, "by_taylor"),
            "taylor_training_seconds": round(search.taylor_training_seconds, 3),
            "rank_correlation": correlations,
            "time_ratio_asked_for": search.ratio,
            "layer_times": {
                "step": search.times.step,
                "full": dict(search.times.full),
                "basis": {p: dict(times) for p, times in search.times.basis.items()},
            },
        },
        "plans": {name: dict(plan) for name, plan in search.plans.items()},
        "step_times": {name: asdict(value) for name, value in study.step_times.items()},
    }


def _sensitivities(search: Search, method: str) -> dict[str, Any]:
    found = getattr(search, method)
    return {
        "costs": {p: {r: number(c) for r, c in v.items()} for p, v in found.costs.items()},
        "errors": {p: {r: number(c) for r, c in v.items()} for p, v in found.errors.items()},
        "baseline": found.baseline,
        "seconds": round(found.seconds, 3),
    }


def metrics_records(variant: str, run: int, curves: Curves) -> list[dict[str, Any]]:
    """One record per epoch."""
    return [
        {
            "variant": variant,
            "run": run,
            "epoch": epoch + 1,
            **{name: number(values[epoch]) for name, values in asdict(curves).items()},
        }
        for epoch in range(len(curves.loss))
    ]
