"""Choosing R for every layer: a multiple-choice knapsack.

Every layer keeps its kernel (cost 0, saving 0) or takes one of its forms; the sum of the costs is
made small and the sum of the savings large. Dynamic programming over the savings solves it
(Kellerer, Pferschy, Pisinger, "Knapsack Problems", 2004, chapter 11).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = 20_000  # of the grid on which savings are counted, for the largest possible saving


@dataclass(frozen=True)
class Option:
    """A form that a layer may take: with R basis filters, what it saves and what it costs."""

    rank: int
    saving: float
    cost: float


Options = Mapping[str, list[Option]]


def cheapest_plan(options: Options, needed: float) -> dict[str, int]:
    """The plan {module path: R} of least cost that saves at least ``needed``.

    ``needed`` is positive and at most ``largest_saving(options)``. Savings are rounded down to
    1/20000 of that largest one, so the plan surely saves what is needed, and costs no more than any
    plan that saves (number of layers) / 20000 of the largest saving more than needed. Of equally
    cheap plans the one that saves most is taken.
    """
    table = _Table(options)
    first = math.ceil(needed / table.unit)
    reaching = table.costs[first:]
    if not bool(reaching.isfinite().any()):  # only the largest saving will do, rounding aside
        return {
            path: max(choices, key=lambda option: (option.saving, -option.cost)).rank
            for path, choices in _useful(options).items()
        }
    return table.plan(first + int((reaching == reaching.min()).nonzero().max()))


def largest_plan(options: Options, max_cost: float) -> dict[str, int]:
    """The plan that saves most at a total cost of at most ``max_cost``, on the same grid.

    Of equally saving plans the cheapest one is taken. {} where no form is cheap enough.
    """
    table = _Table(options)
    return table.plan(int((table.costs <= max_cost).nonzero().max()))


def largest_saving(options: Options) -> float:
    """What is saved when every layer takes its most saving form."""
    return sum(max(option.saving for option in choices) for choices in _useful(options).values())


def _useful(options: Options) -> dict[str, list[Option]]:
    """Forms that save something and were not ruled out by an infinite cost; mildest first."""
    useful = {
        path: sorted(
            (o for o in choices if o.saving > 0 and o.cost < math.inf), key=lambda o: -o.rank
        )
        for path, choices in options.items()
    }
    return {path: choices for path, choices in useful.items() if choices}


class _Table:
    """Least cost for every total saving on the grid, and the choices that lead there."""

    def __init__(self, options: Options) -> None:
        self._layers = _useful(options)
        self.unit = largest_saving(options) / CELLS or 1.0
        self.costs = torch.zeros(1, dtype=torch.float64)
        self._choices: list[Tensor] = []
        for choices in self._layers.values():
            cells = [self._cells(option) for option in choices]
            best = torch.full((len(self.costs) + max(cells),), math.inf, dtype=torch.float64)
            best[: len(self.costs)] = self.costs
            chosen = torch.full((len(best),), -1)
            for index, (option, shift) in enumerate(zip(choices, cells, strict=True)):
                reached = slice(shift, shift + len(self.costs))
                better = self.costs + option.cost < best[reached]  # ties: the milder choice
                best[reached][better] = self.costs[better] + option.cost
                chosen[reached][better] = index
            self.costs = best
            self._choices.append(chosen)

    def plan(self, cell: int) -> dict[str, int]:
        """The choices that lead to this total saving, in the order of the layers."""
        plan: dict[str, int] = {}
        for (path, choices), chosen in zip(
            reversed(self._layers.items()), reversed(self._choices), strict=True
        ):
            index = int(chosen[cell])
            if index >= 0:
                plan[path] = choices[index].rank
                cell -= self._cells(choices[index])
        return dict(reversed(plan.items()))

    def _cells(self, option: Option) -> int:
        return math.floor(option.saving / self.unit)
