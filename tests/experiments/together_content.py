"""A study whose trainings say who takes part in them; workers import it."""

from pathlib import Path

import torch

from growkernels.experiments.study import Content, Fork, Stretch
from growkernels.growth.processes import Ranks


class Counting:
    """Each step adds up the ranks' numbers, counted from 1."""

    def __init__(self, total: float) -> None:
        self.total = total
        self.measured = {"steps": {"sums": []}}

    def advance(self, step: int) -> None:
        ranks = Ranks()
        found = float(ranks.sum(torch.tensor(ranks.own + 1.0)))
        self.total += found
        self.measured["steps"]["sums"].append(found)

    def state(self) -> float:
        return self.total


class Together(Content):
    name = "together"
    claims = Path()
    page = ""
    device = "cpu"

    def config(self):
        return {}

    def stretches(self):
        forks = (Fork(0, "only"),)
        first = Stretch("first", forks, 0, 2)
        return [first, Stretch("then", forks, 2, 5, "first"), Stretch("other", forks, 0, 1)]

    def begin(self, stretch, parent):
        return Counting(0.0 if parent is None else parent.state)

    def resume(self, stretch, stored):
        raise NotImplementedError

    def records(self, results):
        return []

    def conclude(self, results, folder):
        raise NotImplementedError
