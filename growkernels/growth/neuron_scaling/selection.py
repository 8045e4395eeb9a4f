"""Which neurons to grow under a budget of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.costs import Ledger
from growkernels.growth.neuron_scaling.criteria import Scores


@dataclass(frozen=True)
class Selection:
    """The neurons to grow in one step.

    Attributes:
        neurons: layer -> its chosen outputs; layers without any are absent. True as a condition
            if there are some.
        parameters: how many parameters growing them adds, exactly.
        scores: what they were chosen by.
        reason: in a sentence, why these, or why none.
    """

    neurons: dict[str, tuple[int, ...]]
    parameters: int
    scores: Scores
    reason: str

    def __bool__(self) -> bool:
        return bool(self.neurons)

    def __str__(self) -> str:
        """One line per layer, and the reason."""
        lines = [f"{layer}: {len(chosen)} neurons" for layer, chosen in self.neurons.items()]
        return "\n".join([*lines, f"{self.parameters:,} parameters. {self.reason}"])


@dataclass(frozen=True)
class Unit:
    """Neurons of one layer that are selected together or not at all."""

    score: float
    candidate: Candidate
    neurons: tuple[int, ...]


def select(
    candidates: Sequence[Candidate],
    scores: Scores,
    ledger: Ledger,
    budget: int,
    min_eligible: int,
) -> Selection:
    """The best-scored neurons that the budget pays for.

    A neuron is eligible if its score is below 0, a layer if at least ``min_eligible`` of its
    neurons are. Each category with an eligible layer has an equal share of the budget and spends
    it in ascending order of scores; what the shares leave over is spent on the best of the rest.
    In layers of an attention that are widened one neuron of every head is taken at a time.

    Raises:
        ValueError: a budget that does not pay for a single neuron.
    """
    eligible = {c: (scores.values[c.name] < 0).sum().item() for c in candidates}
    units = [
        unit
        for place in candidates
        if eligible[place] >= max(min_eligible, 1)
        for unit in _units(place, scores.values[place.name])
    ]
    if not units:
        most = max(candidates, key=lambda c: eligible[c])
        reason = (
            f"No layer has {min_eligible} eligible neurons (score below 0); {most.name!r} has the "
            f"most, {eligible[most]}."
        )
        if eligible[most] >= max(min_eligible, 1):
            reason = (
                f"{most.name!r} has {eligible[most]} eligible neurons (score below 0), but none in "
                "one of its heads, which are widened together."
            )
        return Selection({}, 0, scores, reason)
    units.sort(key=lambda unit: unit.score)  # stable: registration order decides ties
    cheapest = min(units, key=lambda unit: ledger.cost(unit.candidate, len(unit.neurons)))
    price = ledger.cost(cheapest.candidate, len(cheapest.neurons))
    if budget < price:
        what = "one neuron" if len(cheapest.neurons) == 1 else "one neuron in each head"
        raise ValueError(
            f"The budget of {budget} parameters is too small for {what}: the cheapest, in "
            f"{cheapest.candidate.name!r}, adds {price}."
        )
    categories = sorted({unit.candidate.category for unit in units})
    chosen: list[Unit] = []
    spent = 0
    for category in categories:
        own = (unit for unit in units if unit.candidate.category == category)
        spent += _spend(own, ledger, budget // len(categories), chosen)
    taken = set(map(id, chosen))
    rest = (unit for unit in units if id(unit) not in taken)
    spent += _spend(rest, ledger, budget - spent, chosen)

    neurons: dict[str, tuple[int, ...]] = {}
    for candidate in candidates:
        own_units = [unit for unit in chosen if unit.candidate is candidate]
        if own_units:
            neurons[candidate.name] = tuple(sorted(i for unit in own_units for i in unit.neurons))
    count = sum(map(len, neurons.values()))
    return Selection(
        neurons,
        spent,
        scores,
        f"{count} neurons in {len(neurons)} layers for {spent} of {budget} parameters, the lowest "
        f"by {scores.criterion!r} in each category.",
    )


def _units(candidate: Candidate, values: Tensor) -> list[Unit]:
    """The eligible neurons, one at a time, or one of each head at a time, the best first."""
    numbers = values.tolist()
    heads = 1 if candidate.widening is None else candidate.widening.heads
    per_head = len(numbers) // heads
    ranked = []
    for head in range(heads):
        own = range(head * per_head, (head + 1) * per_head)
        ranked.append(sorted((i for i in own if numbers[i] < 0), key=lambda i: numbers[i]))
    return [
        Unit(sum(numbers[i] for i in neurons) / heads, candidate, neurons)
        for neurons in zip(*ranked, strict=False)
    ]


def _spend(units: Iterable[Unit], ledger: Ledger, share: int, chosen: list[Unit]) -> int:
    """Take every unit that what is left of the share pays for, in order; how much was spent."""
    spent = 0
    for unit in units:
        price = ledger.cost(unit.candidate, len(unit.neurons))
        if spent + price <= share:
            ledger.book(unit.candidate, len(unit.neurons))
            chosen.append(unit)
            spent += price
    return spent
