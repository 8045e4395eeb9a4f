"""The paper's claims, and the ones nobody has tested, against what the finished runs measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from growkernels.experiments.scaling.history import History
from growkernels.experiments.scaling.results import (
    Quantity,
    Results,
    final,
    growth_share,
    parameters,
)
from growkernels.experiments.scaling.settings import Setting
from growkernels.experiments.statistics import (
    Claim,
    Finding,
    Verdict,
    difference,
    estimate,
    lower,
)

OURS = "Not in the paper: "
MAX_CHANGE = 1e-5  # of the largest output, that a growth may change it by

RULE = (
    "A mean counts as higher than another when the difference exceeds two standard errors of that "
    "difference (of the paired differences: a run's number decides the order of the data and, "
    "where two variants start from the same size, the initial weights). Otherwise it cannot be "
    "told. Between equals three runs exceed that in 18 % of all comparisons by chance (Student's "
    "t), so a single verdict deserves little trust. Compared is top-1 accuracy on the "
    "test images, as the mean over the last three epochs. "
    "A claim holds if it holds in every setting that can test it, and does not hold if it fails in "
    "one."
)


def all_claims(setting: Setting, results: Results) -> list[Claim]:
    """The paper's claims first, then ours (``OURS``)."""
    sizes = (("small size", "splitting"), ("large size", "splitting_large"))
    usual = setting.variant("splitting").growth
    assert usual is not None
    intervals = [v.name for v in setting.variants if v.name.startswith("interval_")]
    return [
        Claim(
            "Grown non-uniformly, a reduced network ends with a higher accuracy than the full one "
            "has, at fewer parameters.",
            [_higher(results, name, "homogeneous", size) for size, name in sizes],
        ),
        Claim(
            "It needs fewer operations, too (by a third at the small size, 15 % at the large one).",
            [_fewer_flops(results, name, size) for size, name in sizes],
        ),
        Claim(
            "Growing further, to the large size, helps further.",
            [_higher(results, "splitting_large", "splitting", "large size")],
        ),
        Claim(
            f"Of the intervals between growths, {usual.interval} epochs is the best"
            f"{' (30 in the paper)' if usual.interval != 30 else ''}.",
            [_best_interval(results, intervals)],
        ),
        Claim(
            "Neurons chosen by curvature beat an even growth of all layers (beyond uniform "
            "scaling).",
            [
                _higher(results, "splitting", "uniform", "grown evenly"),
                _higher(results, "splitting", "even_start", "at that size from the start"),
            ],
        ),
        Claim(
            OURS + "growth at the small size ends above the reduced network that never grew.",
            [_higher(results, "splitting", "reduced", "small size")],
        ),
        Claim(
            OURS + "the splitting matrix chooses better neurons than random or the largest weights "
            "do.",
            [_higher(results, "splitting", name, name) for name in ("random", "magnitude")],
        ),
        Claim(
            OURS
            + "the splitting matrix chooses better neurons than the sum of the gradient, which "
            "the authors' code computes.",
            [_higher(results, "splitting", "gradient_sum", "gradient_sum")],
        ),
        Claim(
            OURS + "the curvature of the branch that would be added chooses better neurons than "
            "S2D's curvature of the neuron itself.",
            [_higher(results, "splitting", "s2d", "s2d")],
        ),
        Claim(
            OURS + "new neurons do better in the eigenvector's direction than in their parent's.",
            [_higher(results, "gated_eigenvector", "gated_parent", "gated neurons")],
        ),
        Claim(
            OURS + "no growth changes the network's function by more than 1e-5 of its largest "
            "output.",
            [_preserves(results)],
        ),
        Claim(
            OURS + "growth takes less than 5 % of the training time.",
            [_costs_little(setting, results, name, size) for size, name in sizes],
        ),
    ]


def _higher(results: Results, first: str, second: str, setting: str) -> Finding:
    """Whether ``first`` ends with the higher accuracy."""
    measured = [_values(results, name) for name in (first, second)]
    gap = difference(final(results[second], "top1"), final(results[first], "top1"), paired=True)
    text = (
        f"{first} {measured[0]}, {second} {measured[1]}; paired difference {-gap.mean:+.2f} ± "
        f"{gap.sem:.2f} points ({gap.count} runs)"
    )
    return Finding(setting, text, lower(gap))


def _values(results: Results, name: str) -> str:
    runs = results[name]
    accuracy = estimate(final(runs, "top1"))
    return f"{accuracy.text(2)} % at {_millions(runs)} parameters"


def _millions(runs: Sequence[History]) -> str:
    count = parameters(runs).mean().item()
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def _fewer_flops(results: Results, name: str, setting: str) -> Finding:
    full = results["homogeneous"][0].flops
    shares = torch.tensor([100 * (1 - run.flops / full) for run in results[name]])
    saved = estimate(shares)
    verdict: Verdict = "holds" if bool((shares > 0).all()) else "does not hold"
    return Finding(setting, f"{saved.text(1)} % fewer per image than the full network", verdict)


def _best_interval(results: Results, others: Sequence[str]) -> Finding:
    """Does not hold if another one is surely better; holds if it is surely better than all."""
    quantity: Quantity = "top1"
    usual = final(results["splitting"], quantity)
    gaps = {name: difference(final(results[name], quantity), usual, paired=True) for name in others}
    texts = [
        f"{name.removeprefix('interval_')}: {estimate(final(results[name], quantity)).text(2)} % "
        f"(paired difference {gap.mean:+.2f} ± {gap.sem:.2f})"
        for name, gap in gaps.items()
    ]
    verdicts = [lower(gap) for gap in gaps.values()]
    verdict: Verdict = "cannot be told"
    if "does not hold" in verdicts:
        verdict = "does not hold"
    elif all(v == "holds" for v in verdicts):
        verdict = "holds"
    return Finding("interval", f"{estimate(usual).text(2)} %; " + ", ".join(texts), verdict)


def _preserves(results: Results) -> Finding:
    steps = [step for runs in results.values() for run in runs for step in run.growth]
    worst = max(step.change for step in steps)
    return Finding(
        "every growth",
        f"largest change {worst:.1e} of the largest output, in {len(steps)} growths",
        "holds" if worst <= MAX_CHANGE else "does not hold",
    )


def _costs_little(setting: Setting, results: Results, name: str, size: str) -> Finding:
    share, recipe = estimate(growth_share(results[name])), setting.recipe
    measured = (
        f"{share.text(1)} % of the time for {len(results[name][0].growth)} growths in "
        f"{setting.epochs} epochs"
    )
    if recipe.epoch_images is not None:
        steps = recipe.epoch_images // recipe.batch
        return Finding(size, f"{measured} of only {steps} steps each: no test", None)
    return Finding(size, measured, "holds" if share.mean < 5 else "does not hold")


def overview(claims: Sequence[Claim], results: Results) -> str:
    """A few sentences on what came out, for the top of the report."""
    values = ", ".join(
        f"{name} {_values(results, name)}"
        for name in ("reduced", "splitting", "splitting_large", "homogeneous")
    )
    parts = []
    for kind, ours in (("The paper's claims", False), ("Questions that it leaves open", True)):
        chosen = [c for c in claims if c.statement.startswith(OURS) == ours]
        counts = [
            sum(c.verdict == v for c in chosen)
            for v in ("holds", "does not hold", "cannot be told")
        ]
        answers = ("yes", "no") if ours else ("holds", "does not hold")
        parts.append(
            f"{kind}: {answers[0]} {counts[0]}, {answers[1]} {counts[1]}, cannot be told "
            f"{counts[2]} of {len(chosen)}."
        )
    return f"Top-1 accuracy: {values}. {' '.join(parts)}"
