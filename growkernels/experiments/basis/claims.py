"""The paper's claims, and ours on the search, and what a finished study says about them."""

from __future__ import annotations

from growkernels.experiments.basis.results import Study, agreement
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    BY_TAYLOR,
    BY_TRAINING,
    DENSE,
    EVERYWHERE,
    FULL_FIRST,
)
from growkernels.experiments.statistics import (
    SIGNIFICANT,
    Claim,
    Estimate,
    Finding,
    Verdict,
    lower,
)

SAVING = 15.0  # per cent of the time, the paper's largest
NEGLIGIBLE = 1.0  # percentage points of accuracy; the paper gives no number
CHEAP = 0.1  # of the cost of the search by training
CHANCE = 0.05

RULE = (
    "Accuracies are compared by the paired differences of runs with the same start: a difference "
    "counts when it exceeds two standard errors. A drop is negligible when it plus two standard "
    f"errors stays below {NEGLIGIBLE:g} percentage point, and is not when it minus two standard "
    "errors exceeds that (set by us; the paper gives no number). A time counts as lower when the "
    "upper quartile of its ratio to dense, round by round, is. Otherwise it cannot be told. A "
    "claim holds if it holds in every setting, and does not hold if it fails in one."
)
NAMES = {
    DENSE: "dense",
    EVERYWHERE: "basis everywhere",
    BY_TRAINING: "layers chosen by training",
    BY_TAYLOR: "layers chosen by Taylor",
    BASIS_FIRST: "basis first, then full",
    FULL_FIRST: "full first, then basis",
}


def basis_claims(study: Study) -> list[Claim]:
    """Those of the paper first; those that begin with "Ours" are about our search."""
    chosen = (BY_TRAINING, BY_TAYLOR)
    return [
        Claim(
            f"With basis convolutions in selected layers training is up to {SAVING:g} % faster "
            "(held to be reached from that saving on).",
            [_saving(study, variant) for variant in chosen],
        ),
        Claim(
            "The drop of accuracy with selected layers is negligible.",
            [_negligible(study, variant, DENSE) for variant in chosen],
        ),
        Claim(
            "Basis convolutions in all layers lower the accuracy.",
            [_lower(study, EVERYWHERE, DENSE)],
        ),
        Claim(
            "Basis convolutions in only a part of the epochs lose less accuracy than in all.",
            [_lower(study, EVERYWHERE, variant) for variant in (BASIS_FIRST, FULL_FIRST)],
        ),
        Claim(
            "Basis convolutions belong into the first epochs, not the last (the direction is not "
            "clear from what could be read of the paper).",
            [_lower(study, FULL_FIRST, BASIS_FIRST)],
        ),
        Claim(
            "Ours: the Taylor search orders the layers as short trainings do.",
            [_agreement(study, share) for share in range(len(study.settings.fractions))],
        ),
        Claim(
            "Ours: the Taylor search, with the one training it needs, costs less than a tenth of "
            "the search by training.",
            [_cost(study)],
        ),
        Claim(
            "Ours: layers chosen by Taylor give no lower accuracy than layers chosen by training, "
            "at the same time per step.",
            [_negligible(study, BY_TAYLOR, BY_TRAINING)],
        ),
    ]


def _saving(study: Study, variant: str) -> Finding:
    low, middle, high = (100 * (1 - ratio) for ratio in reversed(study.time_ratio(variant)))
    verdict: Verdict = "cannot be told"
    if low >= SAVING:
        verdict = "holds"
    elif high < SAVING:
        verdict = "does not hold"
    asked = study.search.ratio
    target = "" if asked is None else f", {100 * (1 - asked):.1f} % asked for"
    measured = f"a step saves {middle:.1f} % (quartiles {low:.1f} to {high:.1f}{target})"
    return Finding(NAMES[variant], measured, verdict)


def _comparison(study: Study, first: str, second: str, gap: Estimate) -> str:
    mean = {name: study.final(name).mean().item() for name in (first, second)}
    return (
        f"{mean[first]:.2f} % against {mean[second]:.2f} % ({NAMES[second]}), paired difference "
        f"{gap.mean:+.2f} ± {gap.sem:.2f} percentage points ({gap.count} runs)"
    )


def _lower(study: Study, first: str, second: str) -> Finding:
    """Whether first's accuracy is lower; the setting is the one of the two that is not dense."""
    gap = study.gain(first, second)
    setting = NAMES[first if second == DENSE else second]
    return Finding(setting, _comparison(study, first, second, gap), lower(gap))


def _negligible(study: Study, first: str, second: str) -> Finding:
    gap = study.gain(first, second)
    verdict: Verdict = "cannot be told"
    if gap.count > 1 and -gap.mean + SIGNIFICANT * gap.sem < NEGLIGIBLE:
        verdict = "holds"
    elif gap.count > 1 and -gap.mean - SIGNIFICANT * gap.sem > NEGLIGIBLE:
        verdict = "does not hold"
    return Finding(NAMES[first], _comparison(study, first, second, gap), verdict)


def _agreement(study: Study, share: int) -> Finding:
    fractions = study.settings.fractions
    found, chance = agreement(study.search, share, len(fractions))
    layers = len(study.search.by_training.costs)
    verdict: Verdict = "holds" if chance < CHANCE else "cannot be told"
    if chance > 1 - CHANCE:
        verdict = "does not hold"
    measured = f"rank correlation {found:+.2f} over {layers} layers (by chance: p = {chance:.3f})"
    return Finding(f"{fractions[share]:g} of the filters", measured, verdict)


def _cost(study: Study) -> Finding:
    search = study.search
    ours = search.by_taylor.seconds + search.taylor_training_seconds
    theirs = search.by_training.seconds
    measured = (
        f"{search.by_taylor.seconds:.1f} s and {search.taylor_training_seconds:.1f} s for the "
        f"training, against {theirs:.1f} s: {100 * ours / theirs:.1f} %"
    )
    return Finding(
        "seconds of one core or GPU",
        measured,
        "holds" if ours < CHEAP * theirs else "does not hold",
    )
