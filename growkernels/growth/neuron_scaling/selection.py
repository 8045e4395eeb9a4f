"""Which neurons to grow under a budget of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from growkernels.growth.neuron_scaling.candidates import Candidate
from growkernels.growth.neuron_scaling.costs import Ledger
from growkernels.growth.neuron_scaling.criteria import DECREASES, Scores


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
    budget: float,
    min_eligible: int,
    widths: Mapping[str, int],
    round_to: int | None = None,
) -> Selection:
    """The best-scored neurons that the budget pays for.

    A neuron is eligible if its score is below 0, a layer if at least ``min_eligible`` of its
    neurons are. Each category with an eligible layer has an equal share of the budget and spends
    it in ascending order of scores; what the shares leave over is spent on the best of the rest.
    In layers of an attention that are widened one neuron of every head is taken at a time, in front
    of a group norm as many as a group has, and with ``round_to`` as many as make the width a
    multiple of it. Criteria that predict a decrease of the loss (``DECREASES``) spend the whole
    budget in ascending order of score per price.

    Args:
        widths: layer -> its outputs.

    Raises:
        ValueError: a budget that does not pay for a single neuron.
    """
    eligible = {c: (scores.values[c.name] < 0).sum().item() for c in candidates}
    units = [
        unit
        for place in candidates
        if eligible[place] >= max(min_eligible, 1)
        for unit in _units(place, scores.values[place.name], widths[place.name], round_to)
    ]
    if not units:
        most = max(candidates, key=lambda c: eligible[c])
        reason = (
            f"No layer has {min_eligible} eligible neurons (score below 0); {most.name!r} has the "
            f"most, {eligible[most]}."
        )
        if eligible[most] >= max(min_eligible, 1):
            reason = (
                f"{most.name!r} has {eligible[most]} eligible neurons (score below 0), but "
                + (
                    "none in one of its heads, which are widened together."
                    if most.widening is not None and most.widening.heads > 1
                    else "not as many as it grows by at a time."
                )
            )
        return Selection({}, 0, scores, reason)
    units.sort(key=lambda unit: unit.score)  # stable: registration order decides ties
    cheapest = min(units, key=lambda unit: ledger.cost(unit.candidate, len(unit.neurons)))
    price = ledger.cost(cheapest.candidate, len(cheapest.neurons))
    if budget < price:
        count = len(cheapest.neurons)
        widening = cheapest.candidate.widening
        in_heads = widening is not None and count == widening.heads > 1
        what = "one neuron in each head" if in_heads else f"{count} neurons"
        raise ValueError(
            f"The budget of {budget:g} {ledger.unit} is too small for "
            f"{'one neuron' if count == 1 else what}: the cheapest, in "
            f"{cheapest.candidate.name!r}, adds {price:g}."
        )
    categories = sorted({unit.candidate.category for unit in units})
    if scores.criterion in DECREASES:
        units.sort(
            key=lambda u: u.score * len(u.neurons) / ledger.cost(u.candidate, len(u.neurons))
        )
        categories = []
    chosen: list[Unit] = []
    spent = 0.0
    for category in categories:
        own = (unit for unit in units if unit.candidate.category == category)
        spent += _spend(own, ledger, budget / len(categories), chosen)
    taken = set(map(id, chosen))
    rest = (unit for unit in units if id(unit) not in taken)
    spent += _spend(rest, ledger, budget - spent, chosen)

    neurons: dict[str, tuple[int, ...]] = {}
    for candidate in candidates:
        own_units = [unit for unit in chosen if unit.candidate is candidate]
        if own_units:
            neurons[candidate.name] = tuple(sorted(i for unit in own_units for i in unit.neurons))
    count = sum(map(len, neurons.values()))
    among = " in each category" if categories else ", for their price"
    return Selection(
        neurons,
        ledger.parameters,
        scores,
        f"{count} neurons in {len(neurons)} layers for {spent:.10g} of {budget:.10g} "
        f"{ledger.unit}, the lowest by {scores.criterion!r}{among}.",
    )


def _units(candidate: Candidate, values: Tensor, width: int, round_to: int | None) -> list[Unit]:
    """The eligible neurons, the best first, in the smallest numbers that the layer can grow by.

    That is one at a time, or one of each head; whole groups of a group norm; and as many as make
    the layer's width a multiple of ``round_to``.
    """
    numbers = values.tolist()
    widening = candidate.widening
    heads, multiple = (1, 1) if widening is None else (widening.heads, widening.multiple)
    per_head = len(numbers) // heads
    ranked = []
    for head in range(heads):
        own = range(head * per_head, (head + 1) * per_head)
        ranked.append(sorted((i for i in own if numbers[i] < 0), key=lambda i: numbers[i]))
    units: list[Unit] = []
    taken: list[int] = []
    count = 0
    for neurons in zip(*ranked, strict=False):
        taken += neurons
        count += len(neurons)
        whole = len(taken) % multiple == 0
        if whole and (round_to is None or widening is None or (width + count) % round_to == 0):
            mean = sum(numbers[i] for i in taken) / len(taken)
            units.append(Unit(mean, candidate, tuple(taken)))
            taken = []
    return units


def _spend(units: Iterable[Unit], ledger: Ledger, share: float, chosen: list[Unit]) -> float:
    """Take every unit that what is left of the share pays for, in order; how much was spent."""
    spent = 0.0
    for unit in units:
        price = ledger.cost(unit.candidate, len(unit.neurons))
        if spent + price <= share:
            ledger.book(unit.candidate, len(unit.neurons))
            chosen.append(unit)
            spent += price
    return spent
