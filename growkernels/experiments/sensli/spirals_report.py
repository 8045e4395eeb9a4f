"""The plots and the page of the spirals study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growkernels.experiments import report
from growkernels.experiments.report import Figures, Plot, Section
from growkernels.experiments.run_folder import RunFolder
from growkernels.experiments.sensli import flops, plots
from growkernels.experiments.sensli.engine import SettingRun
from growkernels.experiments.statistics import RULE, Claim

TITLE = "SensLI on the spirals: where and when to insert a layer"

VARIANTS = (
    "The variants: small is never changed; max, min and random insert one layer where the merit is "
    "largest, smallest, or anywhere, and max_3 and so on three; scratch_1 and scratch_3 train what "
    "these end as from the start; large has twice the hidden layers. Settings (exp2 and so on) are "
    "described below."
)

DEVIATIONS = (
    "All initialisations of all variants of a setting train as one batched network, in float32; a "
    "test shows that each equals the network trained alone with autograd and torch.optim.SGD.",
    "Initial weights, the 450/150 split and the order of mini-batches come from seeded generators; "
    "the authors' split depends on a directory listing and cannot be repeated.",
    "The merit is the squared Frobenius norm of the gradient over all training points, which is "
    "the mean over mini-batches of equal size.",
    "The three-insertion schedules are ours (450, 900, 1350 of 1850 epochs; 250, 350, 450 of 550 "
    "in exp8): the authors' code has none. They continue the one-insertion runs, and are compared "
    "with the final architecture (base + 3 layers) from scratch.",
    "The random position is ours too; the authors' code has max and min.",
    "'large' doubles the list of widths as the authors' code does, so for more than one hidden "
    "layer it is larger than the network after one insertion; 'scratch_1' is the final "
    "architecture of one insertion.",
    "Fixed networks keep the initial learning rate, inserted ones follow the setting's factor, as "
    "in the authors' code. Where that makes them differ at the end (exp7, exp8) the comparison "
    "with fixed networks is shown but does not count.",
    "The when-to-insert sweeps run 30 initialisations where the paper shows one, or up to ten.",
    "A run that reaches zero test error stops, as in the authors' code: its numbers stay.",
    "Training at these learning rates amplifies rounding: single runs differ between machines, "
    "means over runs within their standard errors. On one machine numbers repeat exactly.",
)


def draw_plots(runs: Sequence[SettingRun]) -> dict[str, Plot]:
    """The figures these settings can fill, by file name."""
    compared = [run for run in runs if run.setting.role == "one or three insertions"]
    three = [run for run in compared if run.setting.has("max_3")]
    choosing = [run for run in compared if run.setting.hidden > 1]
    swept = [run for run in runs if run.setting.role == "when to insert"]
    drawn: dict[str, Plot] = {}
    if compared:
        names = ("small", "max", "min", "random", "scratch_1", "large")
        drawn["loss_one_insertion"] = Plot(
            plots.loss_curves(compared, names),
            "One insertion. Mean training loss over all initialisations; bands show one standard "
            "error, the dashed line is the insertion.",
        )
    if three:
        drawn["loss_three_insertions"] = Plot(
            plots.loss_curves(three, ("small", "max_3", "min_3", "random_3", "scratch_3")),
            "Three spaced insertions (dashed lines) against the final architecture from scratch.",
        )
    if choosing:
        drawn["merits"] = Plot(
            plots.merit_positions(choosing),
            "Merits at the first insertion: one thin line per initialisation, the geometric mean "
            "in bold.",
        )
    if swept:
        drawn["insertion_times"] = Plot(
            plots.insertion_times(swept),
            "When to insert: final training loss against the epoch of the insertion, mean and one "
            "standard error; lines with bands are the networks without insertion.",
        )
    if compared:
        best = max(compared, key=lambda run: run.setting.full_batch)
        drawn["decision_boundary"] = Plot(
            plots.decision_boundaries(best),
            f"{best.setting.name}, the run with the median final loss: predicted class (shading), "
            "decision boundary (line) and training points.",
        )
    return drawn


def write_report(
    folder: RunFolder,
    runs: Sequence[SettingRun],
    claims: Sequence[Claim],
    drawn: Mapping[str, Plot],
    summary: Mapping[str, Any],
) -> None:
    sections = [
        report.pictures(drawn),
        _final_values(runs, summary),
        _costs(runs, summary),
        _settings(runs),
        report.differences(DEVIATIONS),
        _how_to(summary),
    ]
    page = report.render(
        TITLE, summary["overview"], claims, f"{RULE} {VARIANTS}", sections, summary["environment"]
    )
    folder.write_bytes("report.html", page.encode())


def _final_values(runs: Sequence[SettingRun], summary: Mapping[str, Any]) -> Section:
    section = Section("Final values")
    rows = []
    for run in runs:
        for variant in run.setting.variants:
            value = summary["settings"][run.setting.name][variant.name]
            rows.append(
                [
                    run.setting.name,
                    variant.name,
                    Figures(str(variant.final_hidden)),
                    _mean_sem(value["loss_mean"], value["loss_sem"], 4),
                    _mean_sem(value["error_mean"], value["error_sem"], 2),
                    Figures(str(value["runs"])),
                    Figures(str(value["stopped_early"])),
                    Figures(f"{value['seconds']:.1f}"),
                ]
            )
    section.table(
        ["Setting", "Variant", "Hidden layers", "Training loss", "Test error, %", "Runs",
         "Stopped at zero error", "Seconds"],
        rows,
    )  # fmt: skip
    section.text(
        "Mean ± standard error after the last epoch. Seconds are the variant's share of the "
        "batched training; a first phase that several variants share counts for each."
    )
    return section


def _mean_sem(mean: float | None, sem: float | None, digits: int) -> Figures:
    if mean is None or sem is None:
        return Figures("diverged")
    return Figures(f"{mean:.{digits}f} ± {sem:.{digits}f}")


def _costs(runs: Sequence[SettingRun], summary: Mapping[str, Any]) -> Section:
    section = Section("What the merits cost")
    rows = []
    for run in runs:
        setting = run.setting
        if setting.name not in summary["merit_pass_milliseconds"]:
            continue
        time = summary["merit_pass_milliseconds"][setting.name]
        rows.append(
            [
                setting.name,
                Figures(f"{flops.training_flops(setting, setting.variant('max')) / 1e6:.0f}"),
                Figures(f"{flops.authors_merit_flops(setting) / 1e3:.0f}"),
                Figures(f"{flops.our_merit_flops(setting) / 1e3:.0f}"),
                Figures(f"{time['ordinary']:.2f}"),
                Figures(f"{time['authors']:.2f}"),
                Figures(f"{time['driver']:.2f}"),
                Figures(f"{time['batched']:.3f}"),
            ]
        )
    section.table(
        ["Setting", "Training, MFLOP", "Authors' pass, kFLOP", "Our pass, kFLOP",
         "Ordinary pass, ms", "Authors' pass, ms", "Driver, ms", "Batched, ms per network"],
        rows,
    )  # fmt: skip
    section.text(
        "FLOPs of matrix products, from shapes, for one run with one insertion. Times are medians "
        "of interleaved repetitions on this machine over the setting's own batches: an ordinary "
        "forward and backward of one network, the authors' extended network, LayerInsertion on "
        "one network (its ordinary pass included), and the op on all initialisations at once. "
        "Networks this small measure overhead per call, not arithmetic."
    )
    return section


def _settings(runs: Sequence[SettingRun]) -> Section:
    section = Section("Settings")
    rows = []
    for run in runs:
        s = run.setting
        inserting = [v for v in s.variants if v.insertions]
        first = sorted({v.insertions[0].epoch for v in inserting})
        when = ", ".join(map(str, first))
        factor = inserting[0].insertions[0].rate_factor if inserting else 1.0
        rows.append(
            [s.name, s.script, s.title, Figures(f"{s.rate:g}"), Figures(f"{factor:g}"),
             f"{when} of {s.epochs}", Figures(str(s.runs))]
        )  # fmt: skip
    section.table(
        ["Setting", "The authors' script", "Base network", "Learning rate",
         "Factor at insertion", "First insertion, epoch", "Runs"],
        rows,
    )  # fmt: skip
    section.text(
        "Data: two spirals without noise, 300 points per class, radius 0.5 to 1.5 in one turn, 450 "
        "points for training. Cross-entropy, plain (stochastic) gradient descent."
    )
    return section


def _how_to(summary: Mapping[str, Any]) -> Section:
    return report.run_again(
        f"growkernels reproduce sensli --preset {summary['preset']} --out FOLDER",
        "the same numbers",
        "Curves",
    )
