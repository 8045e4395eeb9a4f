"""What a search found: the cost of giving a layer few basis filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from growkernels.nn.module_paths import NotedByPath


@dataclass(frozen=True)
class Sensitivities(NotedByPath):
    """Cost of replacing one layer by its form with R basis filters, for all layers and R.

    Attributes:
        method: ``"taylor"``: the cost is the predicted increase of the loss. ``"train"``: it is
            the loss of quality (accuracy) after a short training.
        costs: module path -> R -> cost; inf where a training diverged. A cost below zero says that
            the replaced layer did better.
        errors: the standard errors of the costs, over calibration batches or seeds; NaN for one.
        baseline: loss (taylor) or quality (train) of the model as it is, a mean over the same.
        seconds: computing time of the search, summed over worker processes.
    """

    method: str
    costs: Mapping[str, Mapping[int, float]]
    errors: Mapping[str, Mapping[int, float]]
    baseline: float
    seconds: float

    def __str__(self) -> str:
        """One line per layer: what each number of basis filters costs."""
        lines = [f"{self.method}, baseline {self.baseline:.4g}, {self.seconds:.0f} s of computing"]
        for path, costs in self.costs.items():
            parts = (f"{rank} filters {cost:+.3g}" for rank, cost in sorted(costs.items()))
            lines.append(f"{path}: {', '.join(parts)}")
        return "\n".join(lines)

    def cost_of(self, plan: Mapping[str, int]) -> float:
        """The sum of a plan's costs; layers are taken to act independently of one another.

        Raises:
            ValueError: a layer or number of basis filters that was not searched.
        """
        total = 0.0
        for path, rank in plan.items():
            own = self.own_path(plan, path)
            if rank not in self.costs.get(own, {}):
                raise ValueError(
                    f"The plan gives layer {path!r} {rank} basis filters, which was not searched; "
                    "name that layer and fraction in the search."
                )
            total += self.costs[own][rank]
        return total
