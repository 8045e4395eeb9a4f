"""Which neurons to grow under a budget of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Offer:
    """What a driver's layers have to be selected from.

    Attributes:
        candidates, scores: the layers, and what their neurons score.
        ledger: what they cost.
        min_eligible: how many neurons of a layer must be eligible.
        widths: layer -> its outputs.
        round_to: what widths shall be multiples of.
    """

    candidates: Sequence[Candidate]
    scores: Scores
    ledger: Ledger
    min_eligible: int
    widths: Mapping[str, int]
    round_to: int | None

    def units(self, values: Mapping[str, Tensor]) -> list[Unit]:
        """All that is eligible by these values, layer by layer; the best of each layer first."""
        return [
            unit
            for place in self.candidates
            if _eligible(values[place.name]) >= max(self.min_eligible, 1)
            for unit in _units(place, values[place.name], self.widths[place.name], self.round_to)
        ]

    def selected(self, chosen: Sequence[Unit], reason: str) -> Selection:
        """These of its units, which are booked in its ledger."""
        neurons: dict[str, tuple[int, ...]] = {}
        for candidate in self.candidates:
            own = [unit for unit in chosen if unit.candidate is candidate]
            if own:
                neurons[candidate.name] = tuple(sorted(i for unit in own for i in unit.neurons))
        return Selection(neurons, self.ledger.parameters, self.scores, reason)


def select(offer: Offer, budget: float) -> Selection:
    """The best-scored neurons that the budget pays for.

    A neuron is eligible if its score is below 0, a layer if at least ``min_eligible`` of its
    neurons are. Each category with an eligible layer has an equal share of the budget and spends
    it in ascending order of scores; what the shares leave over is spent on the best of the rest.
    In layers of an attention that are widened one neuron of every head is taken at a time, in front
    of a group norm as many as a group has, and with ``round_to`` as many as make the width a
    multiple of it. Criteria that predict a decrease of the loss (``DECREASES``) spend the whole
    budget in ascending order of score per price.

    Raises:
        ValueError: a budget that does not pay for a single neuron.
    """
    scores, ledger = offer.scores, offer.ledger
    units = offer.units(scores.values)
    if not units:
        return Selection({}, 0, scores, _why_none(offer))
    units.sort(key=lambda unit: unit.score)  # stable: registration order decides ties
    _check_pays([(unit, ledger) for unit in units], budget)
    categories = sorted({unit.candidate.category for unit in units})
    if scores.criterion in DECREASES:
        units.sort(key=lambda unit: _per_price(unit, ledger))
        categories = []
    chosen: list[Unit] = []
    spent = 0.0
    for category in categories:
        own = (unit for unit in units if unit.candidate.category == category)
        spent += _spend(own, ledger, budget / len(categories), chosen)
    taken = set(map(id, chosen))
    rest = (unit for unit in units if id(unit) not in taken)
    spent += _spend(rest, ledger, budget - spent, chosen)
    selection = offer.selected(chosen, "")
    count = sum(map(len, selection.neurons.values()))
    among = " in each category" if categories else ", for their price"
    return replace(
        selection,
        reason=f"{count} neurons in {len(selection.neurons)} layers for {spent:.10g} of "
        f"{budget:.10g} {ledger.unit}, the lowest by {scores.criterion!r}{among}.",
    )


def shared(offers: Sequence[Offer], budget: float, step: float) -> list[Selection]:
    """Of several offers, whose ledgers know of each other, those of the largest decrease per price.

    Raises:
        ValueError: a criterion that predicts no decrease, or a budget that does not pay for a
            single neuron.
    """
    found = [
        (unit, offer)
        for offer in offers
        for unit in offer.units({n: -v for n, v in offer.scores.decreases(step).items()})
    ]
    if not found:
        return [Selection({}, 0, offer.scores, _why_none(offer)) for offer in offers]
    found.sort(key=lambda pair: _per_price(pair[0], pair[1].ledger))
    _check_pays([(unit, offer.ledger) for unit, offer in found], budget)
    chosen: dict[int, list[Unit]] = {id(offer): [] for offer in offers}
    spent = 0.0
    for unit, offer in found:
        spent += _spend([unit], offer.ledger, budget - spent, chosen[id(offer)])
    reason = (
        f"A part of {spent:.10g} of {budget:.10g} {offers[0].ledger.unit}, shared by the decrease "
        f"of the loss that a step of {step:g} is predicted to give."
    )
    return [offer.selected(chosen[id(offer)], reason) for offer in offers]


def _eligible(values: Tensor) -> int:
    return int((values < 0).sum())


def _per_price(unit: Unit, ledger: Ledger) -> float:
    count = len(unit.neurons)
    return unit.score * count / ledger.cost(unit.candidate, count)


def _why_none(offer: Offer) -> str:
    eligible = {c: _eligible(offer.scores.values[c.name]) for c in offer.candidates}
    most = max(offer.candidates, key=lambda c: eligible[c])
    if eligible[most] < max(offer.min_eligible, 1):
        return (
            f"No layer has {offer.min_eligible} eligible neurons (score below 0); {most.name!r} "
            f"has the most, {eligible[most]}."
        )
    return f"{most.name!r} has {eligible[most]} eligible neurons (score below 0), but " + (
        "none in one of its heads, which are widened together."
        if most.widening is not None and most.widening.heads > 1
        else "not as many as it grows by at a time."
    )


def _check_pays(offered: Sequence[tuple[Unit, Ledger]], budget: float) -> None:
    """Raise unless the budget pays for the cheapest unit."""
    prices = [ledger.cost(unit.candidate, len(unit.neurons)) for unit, ledger in offered]
    price = min(prices)
    cheapest, ledger = offered[prices.index(price)]
    if not budget >= price:  # or NaN
        count = len(cheapest.neurons)
        widening = cheapest.candidate.widening
        in_heads = widening is not None and count == widening.heads > 1
        what = "one neuron in each head" if in_heads else f"{count} neurons"
        raise ValueError(
            f"The budget of {budget:g} {ledger.unit} is too small for "
            f"{'one neuron' if count == 1 else what}: the cheapest, in "
            f"{cheapest.candidate.name!r}, adds {price:g}."
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
