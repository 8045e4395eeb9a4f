"""The paper's claims on convolutional networks and what the finished runs say about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from growkernels.experiments.sensli import cnn_results as results
from growkernels.experiments.sensli.cnn_engine import CnnRun
from growkernels.experiments.sensli.cnn_merits import training_flops
from growkernels.experiments.sensli.cnn_results import final, merit_passes
from growkernels.experiments.statistics import (
    Claim,
    Estimate,
    Finding,
    Verdict,
    difference,
    estimate,
    gap_in_loss_only,
    lower,
)
from growkernels.models.vgg import vgg

PAPER_EPOCHS = 100  # of exp5, to which the share of the merit pass refers


def cnn_claims(runs: Mapping[str, Sequence[CnnRun]]) -> list[Claim]:
    fixed, rules = runs["cnn_exp5"], runs["cnn_exp9"]
    times, attempts = runs["cnn_exp12"], runs["cnn_exp1"]
    return [
        Claim(
            "One insertion: training loss ends below the small fixed net's.",
            [_lower(fixed, "max", "small")],
        ),
        Claim(
            "One insertion: training loss stays above that of the large net from scratch.",
            [_lower(fixed, "large", "max")],
        ),
        Claim(
            "The position of largest merit beats the one of smallest merit.",
            [_lower(rules, "max", "min")],
        ),
        Claim(
            "The gap between positions shows in training loss, little in test error.",
            [_gap_in_loss_only(rules)],
        ),
        Claim(
            "Several spaced insertions: training loss ends below that of the final architecture "
            "trained from scratch.",
            [_several(attempts)],
        ),
        Claim("Inserting late helps less.", [_late_is_weaker(times)]),
        Claim(
            "The operator norm separates the positions best.",
            [_separation(runs[name]) for name in ("cnn_exp5", "cnn_exp9")],
        ),
        Claim(
            "One insertion saves 10 to 20 % of the training FLOPs of the final architecture.",
            [_saving(fixed, "max"), _saving(rules, "max")],
        ),
        Claim(
            "The merit pass costs about 2.5 % of the training FLOPs (organised as the authors do, "
            f"in {PAPER_EPOCHS} epochs; about: 1.25 to 3.75 %).",
            [_merit_share(fixed), _merit_share(rules)],
        ),
    ]


def _gap(runs: Sequence[CnnRun], first: str, second: str, quantity: str = "loss") -> Estimate:
    paired = results.started_alike(runs[0].setting, first, second)
    return difference(final(runs, first, quantity), final(runs, second, quantity), paired)


def _comparison(runs: Sequence[CnnRun], first: str, second: str) -> str:
    a, b, gap = (
        estimate(final(runs, first)),
        estimate(final(runs, second)),
        _gap(runs, first, second),
    )
    kind = (
        "paired difference"
        if results.started_alike(runs[0].setting, first, second)
        else ("difference")
    )
    return (
        f"{first} {a.text()}, {second} {b.text()}; {kind} {gap.mean:+.3f} ± {gap.sem:.3f} "
        f"({gap.count} runs)"
    )


def _lower(runs: Sequence[CnnRun], first: str, second: str) -> Finding:
    return Finding(
        runs[0].setting.name, _comparison(runs, first, second), lower(_gap(runs, first, second))
    )


def _gap_in_loss_only(runs: Sequence[CnnRun]) -> Finding:
    loss, error = _gap(runs, "max", "min"), _gap(runs, "max", "min", "error")
    return gap_in_loss_only(runs[0].setting.name, loss, error)


def _several(runs: Sequence[CnnRun]) -> Finding:
    name = runs[0].setting.name
    made = [[d for d in results.decisions(run, "sensli") if d != "declined"] for run in runs]
    counts = ", ".join(str(len(layers)) for layers in made)
    if not any(made):
        return Finding(name, "no layer was inserted in any run: no test", None)
    measured = f"layers inserted per run: {counts}; {_comparison(runs, 'sensli', 'final')}"
    return Finding(name, measured, lower(_gap(runs, "sensli", "final")))


def sweep(runs: Sequence[CnnRun]) -> tuple[list[int], Tensor, Tensor]:
    """Epochs tried, final losses [epochs tried, runs], and whether a layer was inserted (same)."""
    variants = [v for v in runs[0].setting.variants if v.attempts]
    losses = torch.stack([final(runs, v.name) for v in variants])
    inserted = [
        [merit_passes(run, v.name)[0].inserted is not None for run in runs] for v in variants
    ]
    return [v.attempts[0].epoch for v in variants], losses, torch.tensor(inserted)


def _late_is_weaker(runs: Sequence[CnnRun]) -> Finding:
    epochs, losses, inserted = sweep(runs)
    losses = losses.masked_fill(~inserted, torch.nan)
    third = max(1, len(epochs) // 3)
    early, late = losses[:third].nanmean(0), losses[-third:].nanmean(0)
    gap = difference(early, late, paired=True)
    times = ", ".join(
        f"{epoch}: {estimate(row).mean:.3f}" if row.isfinite().any() else f"{epoch}: declined"
        for epoch, row in zip(epochs, losses, strict=True)
    )
    measured = (
        f"final loss by insertion epoch {times}; earliest third minus latest "
        f"{gap.mean:+.3f} ± {gap.sem:.3f} ({gap.count} runs)"
    )
    return Finding(runs[0].setting.name, measured, lower(gap))


def _separation(runs: Sequence[CnnRun]) -> Finding:
    """Largest over smallest merit, as logarithms, so that runs average as ratios."""
    logs = {
        norm: torch.tensor([merit.spread(norm) for merit in results.first_passes(runs)]).log()
        for norm in ("operator", "frobenius", "frobenius_scaled")
    }
    means = ", ".join(f"{_NORM_NAMES[n]} {estimate(v).mean:.2f}" for n, v in logs.items())
    verdicts = [
        lower(difference(logs[other], logs["operator"], paired=True))
        for other in ("frobenius", "frobenius_scaled")
    ]
    verdict: Verdict = "cannot be told"
    if "does not hold" in verdicts:
        verdict = "does not hold"
    elif verdicts == ["holds", "holds"]:
        verdict = "holds"
    count = len(logs["operator"])
    return Finding(
        runs[0].setting.name,
        f"mean log(largest/smallest merit): {means} ({count} merit passes)",
        verdict,
    )


_NORM_NAMES = {
    "operator": "operator norm",
    "frobenius": "Frobenius",
    "frobenius_scaled": "scaled Frobenius",
}


def _saving(runs: Sequence[CnnRun], name: str) -> Finding:
    shares = [
        100 * (1 - results.training_flops(run, name) / results.final_architecture_flops(run, name))
        for run in runs
    ]
    merit = estimate(
        torch.tensor(
            [
                100 * sum(m.flops for m in merit_passes(run, name))
                / results.final_architecture_flops(run, name)
                for run in runs
            ]
        )
    )  # fmt: skip
    saved = estimate(torch.tensor(shares))
    places = " or ".join(sorted({place for run in runs for place in results.decisions(run, name)}))
    verdict: Verdict = "holds" if 10 <= saved.mean <= 20 else "does not hold"
    return Finding(
        runs[0].setting.name,
        f"{saved.text(1)} % saved, of which the merit pass takes {merit.text(1)} (layer behind "
        f"{places})",
        verdict,
    )


def _merit_share(runs: Sequence[CnnRun]) -> Finding:
    run = runs[0]
    setting, (merit,) = run.setting, merit_passes(run, "max")
    images = len(run.data.train_labels)
    epoch = results.training_flops(run, "max") / setting.epochs
    authors = 100 * authors_merit_flops(run) * images / (epoch * PAPER_EPOCHS)
    ours = 100 * merit.flops / (epoch * PAPER_EPOCHS)
    here = 100 * merit.flops / results.training_flops(run, "max")
    training = results.seconds(run, "max") - merit.seconds
    measured = (
        f"authors' extended network {authors:.2f} %, ours {ours:.2f} % at {PAPER_EPOCHS} epochs; "
        f"in this run of {setting.epochs} epochs ours is {here:.1f} % of the FLOPs and "
        f"{100 * merit.seconds / training:.1f} % of the training time"
    )
    verdict: Verdict = "holds" if 1.25 <= authors <= 3.75 else "does not hold"
    return Finding(setting.name, measured, verdict)


def authors_merit_flops(run: CnnRun) -> float:
    """Per image: forward and backward of the base net with a layer behind every convolution."""
    setting = run.setting
    extended = vgg(
        setting.widths,
        [2] * len(setting.widths),
        classes=len(run.data.classes),
        image_size=run.data.train_images.shape[-1],
        head_width=setting.head_width,
    )
    return training_flops(extended, run.normalise(run.data.train_images[:2]).cpu())
