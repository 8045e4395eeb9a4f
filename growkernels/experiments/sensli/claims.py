"""The paper's claims and what the finished settings say about them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli import flops
from growkernels.experiments.sensli.engine import SettingRun, lineages_of
from growkernels.experiments.sensli.results import final
from growkernels.experiments.statistics import (
    SIGNIFICANT,
    Claim,
    Estimate,
    Finding,
    Verdict,
    difference,
    equal,
    estimate,
    gap_in_loss_only,
    lower,
    tally,
)


def all_claims(runs: Sequence[SettingRun]) -> list[Claim]:
    compared = [run for run in runs if run.setting.role == "one or three insertions"]
    swept = [run for run in runs if run.setting.role == "when to insert"]
    three = [run for run in compared if run.setting.has("max_3")]
    full = [run for run in compared if run.setting.full_batch]
    mini = [run for run in compared if not run.setting.full_batch]
    return [
        Claim(
            "One insertion: training loss ends below the small fixed net's.",
            [_lower(run, "max", "small") for run in compared],
        ),
        Claim(
            "One insertion: training loss stays above that of the large net from scratch.",
            [_lower(run, "large", "max") for run in compared],
        ),
        Claim(
            "Three spaced insertions: training loss ends below that of the final architecture "
            "trained from scratch.",
            [_lower(run, "max_3", "scratch_3") for run in three],
        ),
        Claim(
            "Full batch: the position of largest merit beats the one of smallest merit.",
            [_lower(run, "max", "min") for run in full],
        ),
        Claim(
            "Full batch: the position of largest merit beats a random one.",
            [_lower(run, "max", "random") for run in full],
        ),
        Claim(
            "Mini-batch, one insertion: largest, smallest and random end equal.",
            # Of a setting with one position, both comparisons say the same.
            list(
                dict.fromkeys(
                    _equal(run, "max", other) for run in mini for other in ("min", "random")
                )
            ),
        ),
        Claim(
            "Mini-batch, three insertions: largest beats smallest and random again.",
            [
                _lower(run, "max_3", other)
                for run in mini
                if run.setting.has("max_3")
                for other in ("min_3", "random_3")
            ],
        ),
        Claim(
            "Largest against random: a gap in training loss, little in test error.",
            [_gap_in_loss_only(run) for run in compared],
        ),
        Claim("There is no best time to insert.", [_no_best_time(run) for run in swept]),
        Claim("Inserting late helps less.", [_late_is_weaker(run) for run in swept]),
        Claim(
            "One insertion saves 10 to 20 % of the training FLOPs of the final architecture.",
            [_saving(run) for run in compared],
        ),
        Claim(
            "The merit pass costs 0.05 % of the training FLOPs (fully connected nets; counted for "
            "the authors' extended network, and held to be 0.05 % between 0.025 and 0.075).",
            [_merit_share(run) for run in full],
        ),
    ]


def _shared(run: SettingRun, first: str, second: str) -> bool:
    setting = run.setting
    return lineages_of(setting.variant(first)) == lineages_of(setting.variant(second))


def _paired(run: SettingRun, first: str, second: str) -> bool:
    setting = run.setting
    return setting.variant(first).start_hidden == setting.variant(second).start_hidden


def _gap(run: SettingRun, first: str, second: str, quantity: str = "loss") -> Estimate:
    return difference(
        final(run, first, quantity), final(run, second, quantity), _paired(run, first, second)
    )


_ONE_POSITION = "one candidate position, so max = min = random: no test"


def _lower(run: SettingRun, first: str, second: str) -> Finding:
    name = run.setting.name
    if _shared(run, first, second):
        return Finding(name, _ONE_POSITION, None)
    gap = _gap(run, first, second)
    measured = _comparison(run, first, second, gap)
    if _last_rate_factor(run, first) != _last_rate_factor(run, second):
        return Finding(name, f"{measured}; their learning rates differ: no test", None)
    return Finding(name, measured, lower(gap))


def _last_rate_factor(run: SettingRun, variant: str) -> float:
    """The learning rate at the end, as a multiple of the initial one."""
    return math.prod(i.rate_factor for i in run.setting.variant(variant).insertions)


def _equal(run: SettingRun, first: str, second: str) -> Finding:
    name = run.setting.name
    if _shared(run, first, second):
        return Finding(name, _ONE_POSITION, None)
    gap = _gap(run, first, second)
    scale = max(estimate(final(run, v)).mean for v in (first, second))
    return Finding(name, _comparison(run, first, second, gap), equal(gap, scale))


def _comparison(run: SettingRun, first: str, second: str, gap: Estimate) -> str:
    a, b = estimate(final(run, first)), estimate(final(run, second))
    kind = "paired difference" if _paired(run, first, second) else "difference"
    return (
        f"{first} {a.text()}, {second} {b.text()}; {kind} {gap.mean:+.3f} ± {gap.sem:.3f} "
        f"({gap.count} runs)"
    )


def _gap_in_loss_only(run: SettingRun) -> Finding:
    name = run.setting.name
    if _shared(run, "max", "random"):
        return Finding(name, _ONE_POSITION, None)
    loss, error = _gap(run, "max", "random"), _gap(run, "max", "random", "error")
    return gap_in_loss_only(name, loss, error)


def sweep_losses(run: SettingRun) -> tuple[list[int], torch.Tensor]:
    """Insertion epochs, and final losses [epochs tried, runs]."""
    variants = [v for v in run.setting.variants if v.insertions]
    losses = torch.stack([final(run, v.name) for v in variants])
    return [v.insertions[0].epoch for v in variants], losses


def _no_best_time(run: SettingRun) -> Finding:
    """Half of the runs choose the best time, the other half test whether it is better."""
    epochs, losses = sweep_losses(run)
    order = torch.randperm(losses.shape[1], generator=seeded(run.setting.seed, 0))
    half = losses.shape[1] // 2
    chosen = int(losses[:, order[:half]].nanmean(1).argmin())
    test = losses[:, order[half:]]
    others = torch.cat((test[:chosen], test[chosen + 1 :])).mean(0)
    gap = difference(test[chosen], others, paired=True)
    measured = (
        f"half of the runs choose {epochs[chosen]}; on the other half it differs from the other "
        f"times by {gap.mean:+.3f} ± {gap.sem:.3f} ({gap.count} runs)"
    )
    if lower(gap) == "holds":
        return Finding(run.setting.name, measured, "does not hold")
    return Finding(run.setting.name, measured, equal(gap, estimate(others).mean))


def _late_is_weaker(run: SettingRun) -> Finding:
    epochs, losses = sweep_losses(run)
    early, late = losses[:3].mean(0), losses[-3:].mean(0)
    gap = difference(early, late, paired=True)
    measured = (
        f"inserted at {epochs[0]} to {epochs[2]}: {estimate(early).text()}, at {epochs[-3]} to "
        f"{epochs[-1]}: {estimate(late).text()}; paired difference {gap.mean:+.3f} ± "
        f"{gap.sem:.3f} ({gap.count} runs)"
    )
    return Finding(run.setting.name, measured, lower(gap))


def _saving(run: SettingRun) -> Finding:
    setting = run.setting
    ours = flops.training_flops(setting, setting.variant("max"))
    saved = 1 - ours / flops.training_flops(setting, setting.variant("scratch_1"))
    verdict: Verdict = "holds" if 0.1 <= saved <= 0.2 else "does not hold"
    return Finding(setting.name, f"{100 * saved:.1f} % saved", verdict)


def _merit_share(run: SettingRun) -> Finding:
    setting = run.setting
    total = flops.training_flops(setting, setting.variant("max"))
    authors, ours, recorded = (
        100 * count / total
        for count in (
            flops.authors_merit_flops(setting),
            flops.our_merit_flops(setting),
            flops.virtual_flops(setting),
        )
    )
    measured = (
        f"authors' extended network {authors:.3f} %, ours as a pass of its own {ours:.3f} %, "
        f"recorded during a training step {recorded:.4f} %"
    )
    verdict: Verdict = "holds" if 0.025 <= authors <= 0.075 else "does not hold"
    return Finding(setting.name, measured, verdict)


def overview(claims: Sequence[Claim], runs: Sequence[SettingRun]) -> str:
    """Two sentences on what came out, for the top of the report."""
    findings = [_lower(run, "max", "small") for run in runs if run.setting.has("max", "small")]
    able = [finding for finding in findings if finding.verdict]
    better = [finding.setting for finding in able if finding.verdict == "holds"]
    return (
        f"One layer inserted where its merit is largest brought the training loss below the small "
        f"net's by more than {SIGNIFICANT:.0f} standard errors in {len(better)} of {len(able)} "
        f"settings{' (' + ', '.join(better) + ')' if better else ''}. {tally(claims)}"
    )
