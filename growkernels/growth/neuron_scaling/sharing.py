"""One budget for several criteria, on one scale: the predicted decrease of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from growkernels.growth.neuron_scaling.costs import Ledger
from growkernels.growth.neuron_scaling.criteria import Scores
from growkernels.growth.neuron_scaling.driver import NeuronScaling
from growkernels.growth.neuron_scaling.selection import Selection, shared


def share_budget(
    asked: Sequence[tuple[NeuronScaling, Scores]],
    budget: float,
    *,
    step: float,
    unit: str = "parameters",
    sample: Any = None,
    min_eligible: int = 1,
    round_to: int | None = None,
) -> list[Selection]:
    """Spend one budget on the neurons that several drivers of one model offer.

    ::

        branches = NeuronScaling(model)                            # by splitting matrices
        wider = NeuronScaling(model, "gradmax", widen=("fc1",), depth=False)
        for x, y in batches:
            with branches.recording(), wider.recording():
                loss_fn(model(x), y).backward()
        asked = [(branches, branches.scores()), (wider, wider.scores())]
        chosen = share_budget(asked, 500_000, step=0.1)
        if chosen[0]:
            branches.grow(chosen[0], optimizer)
        if chosen[1]:
            wider.grow(chosen[1], optimizer, init="gradmax")

    Neurons are taken in descending order of predicted decrease (``Scores.decreases``, which says
    what is assumed) per price. Grow what has branches first: they leave what others have recorded
    valid, and wider layers do not.

    Args:
        asked: drivers, each with its scores; criteria ``"splitting"`` (with ``depth=True``),
            ``"gradmax"`` and ``"tiny"``.
        budget, unit, sample, min_eligible, round_to: see ``NeuronScaling.select``.
        step: the norm by which each new neuron's own parameters are taken to change.

    Returns:
        What each driver grows, in the order of ``asked``.

    Raises:
        ValueError: drivers of several models, a criterion that predicts nothing, scores of other
            layers, or a budget that does not pay for one neuron.
    """
    if not asked:
        raise ValueError("Nobody asks for a share; give pairs of a NeuronScaling and its scores.")
    if any(driver.model is not asked[0][0].model for driver, _ in asked):
        raise ValueError("The drivers are of several models; a budget is shared within one.")
    for driver, _ in asked:
        if driver.criterion == "splitting" and not driver.depth:
            raise ValueError(
                "Criterion 'splitting' predicts what branches gain, and this driver has "
                "depth=False; take 'gradmax' or 'tiny' for wider layers."
            )
    driver = asked[0][0]
    first = Ledger(driver.model, driver.form, driver.depth, unit, sample)
    offers = [
        driver.offer(scores, first.beside(driver.form, driver.depth), min_eligible, round_to)
        for driver, scores in asked
    ]
    return shared(offers, budget, step)
