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

ROUNDING = 1e-12  # relative, of a sum of savings
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

    ``needed`` is positive and at most ``largest_saving(options)``. The grid's step is 1/20000 of
    that largest one; the plan costs no more than any plan that saves (number of layers) such steps
    more than needed. Of equally cheap plans the one that saves most is taken.
    """
    table = _Table(options)
    enough = table.savings >= needed * (1 - ROUNDING)
    if not bool(enough.any()):  # only the largest saving will do, and its cell holds another plan
        return {
            path: max(choices, key=lambda option: (option.saving, -option.cost)).rank
            for path, choices in _useful(options).items()
        }
    cheapest = enough & (table.costs == table.costs[enough].min())
    return table.plan(_largest(table.savings, cheapest))


def largest_plan(options: Options, max_cost: float) -> dict[str, int]:
    """The plan that saves most at a total cost of at most ``max_cost``, on the same grid.

    It saves at least as much as any other plan at that cost, but for (number of layers) steps. {}
    where no form is cheap enough.
    """
    table = _Table(options)
    return table.plan(_largest(table.savings, table.costs <= max_cost))


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


def _largest(savings: Tensor, among: Tensor) -> int:
    return int(torch.where(among, savings, -math.inf).argmax())


class _Table:
    """For every total saving on the grid the cheapest plan, with what it really saves.

    A form's saving is rounded down to the grid, so a plan saves at least what its cell says.
    """

    def __init__(self, options: Options) -> None:
        self._layers = _useful(options)
        self._step = largest_saving(options) / CELLS
        self.costs = torch.zeros(1, dtype=torch.float64, device="cpu")
        self.savings = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._choices: list[Tensor] = []
        for choices in self._layers.values():
            length = len(self.costs)
            more = max(self._cells(option) for option in choices)
            costs = torch.cat([self.costs, self.costs.new_full((more,), math.inf)])
            savings = torch.cat([self.savings, torch.full_like(costs[length:], -math.inf)])
            chosen = torch.full((len(costs),), -1, device="cpu")
            for index, option in enumerate(choices):
                reached = slice(self._cells(option), self._cells(option) + length)
                better = self.costs + option.cost < costs[reached]  # ties: the milder choice
                costs[reached][better] = self.costs[better] + option.cost
                savings[reached][better] = self.savings[better] + option.saving
                chosen[reached][better] = index
            self.costs, self.savings = costs, savings
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
        return math.floor(option.saving / self._step)
