"""The plots and the page of the CNN study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growkernels.experiments import report
from growkernels.experiments.image_study import LOSSY_IMAGES, is_lossy
from growkernels.experiments.report import Figures, Plot, Section
from growkernels.experiments.sensli import cnn_plots, cnn_results
from growkernels.experiments.sensli.cnn_engine import CnnRun
from growkernels.experiments.sensli.cnn_merits import MeritPass
from growkernels.experiments.sensli.cnn_settings import NORM, TAU
from growkernels.experiments.statistics import RULE, Claim
from growkernels.growth.layer_insertion import NORMS

TITLE = "SensLI on images: inserting convolutions into a small VGG"

VARIANTS = (
    "The variants: small is never changed; max and min insert one convolution where the merit is "
    "largest or smallest; large has one more in front from the start; sensli tries three times to "
    "insert, and final trains what it ends as from the start."
)

DEVIATIONS = (
    "Optimizer: the authors name SGD with momentum 0.9 and weight decay 5e-4 (Adam in exp1), but "
    "their training loop updates every parameter by the bare gradient, so what they ran is plain "
    "SGD. --optimizer plain is that, --optimizer momentum is what they name for all four settings.",
    "The learning rate is constant; the authors lower it in exp1 when the test accuracy stalls, "
    "which would choose by the test data.",
    "Every run has its own initial weights. The authors draw one vector for all ten runs of exp5 "
    "and exp9, so their runs differ in the order of the data alone.",
    "Within a run all variants see the same batches in the same order, and variants with the same "
    "past share it: the network that a layer is inserted into is the small net itself.",
    "The operator norm that decides is that of the convolution (circular, from the transform over "
    "the taps). The authors transform over the channel axes, cut to the first three channels, "
    "which is no norm of the convolution. Frobenius and scaled Frobenius are reported beside it.",
    "The relative rule compares with the mean merit of the existing convolutions, as the paper's "
    "text has it; the authors' code averages over the virtual ones as well.",
    "All merits are those of the gradient averaged over one pass of augmented training images, "
    "without an update; a last batch that is smaller is left out of it.",
    "Optimizer state survives an insertion; the authors start a new optimizer.",
)


def draw_plots(runs: Mapping[str, Sequence[CnnRun]]) -> dict[str, Plot]:
    """All figures, by file name."""
    return {
        "training_loss": Plot(
            cnn_plots.curves(runs, "loss"),
            "Mean loss over the batches of each epoch; bands show one standard error over the "
            "runs, dashed lines the insertions or attempts.",
        ),
        "test_error": Plot(
            cnn_plots.curves(runs, "error"), "Test error after each epoch, drawn in the same way."
        ),
        "merits": Plot(
            cnn_plots.merits(runs),
            "Merits at each run's first attempt in three norms (thin lines: runs; thick: geometric "
            "mean), divided by the mean merit of the existing convolutions in the same norm. Above "
            f"the dashed line the relative rule with τ = {TAU:g} accepts.",
        ),
        "insertion_times": Plot(
            cnn_plots.insertion_times(runs["cnn_exp12"]),
            "When to insert. Line: mean over the runs; dots: single runs, hollow where the attempt "
            "was declined and the network stayed the small one.",
        ),
    }


def render(
    runs: Mapping[str, Sequence[CnnRun]],
    claims: Sequence[Claim],
    drawn: Mapping[str, Plot],
    summary: Mapping[str, Any],
) -> str:
    """The whole page."""
    sections = [
        _conditions(summary),
        report.pictures(drawn),
        _final_values(runs, summary),
        _decisions(runs),
        _costs(runs, summary),
        report.differences(DEVIATIONS),
        _how_to(summary),
    ]
    return report.render(
        TITLE, summary["overview"], claims, f"{RULE} {VARIANTS}", sections, summary["environment"]
    )


def _conditions(summary: Mapping[str, Any]) -> Section:
    section = Section("Under which conditions")
    data = summary["data"]
    section.text(
        f"Data: {data['name']}, {data['train_images']:,} training and {data['test_images']:,} test "
        f"images of {data['size']} pixels; random crops (padding 4) and mirroring."
    )
    if is_lossy(data):
        section.text(LOSSY_IMAGES)
    optimizer = summary["optimizer"]
    section.text(
        f"Optimizer: {optimizer['name']} SGD, learning rate {optimizer['rate']:g}, momentum "
        f"{optimizer['momentum']:g}, weight decay {optimizer['weight_decay']:g}."
    )
    if summary["reduced"]:
        section.text(summary["reduced"])
    return section


def _final_values(runs: Mapping[str, Sequence[CnnRun]], summary: Mapping[str, Any]) -> Section:
    section = Section("Final values")
    rows = []
    for name, setting_runs in runs.items():
        for variant in setting_runs[0].setting.variants:
            value = summary["settings"][name][variant.name]
            if value["runs"] == 0:
                continue
            known = [flops for flops in value["training_flops"] if flops is not None]
            rows.append(
                [
                    f"{name}: {setting_runs[0].setting.title}",
                    variant.name,
                    Figures(_range([p for p in value["parameters"] if p is not None])),
                    Figures(f"{value['loss_mean']:.4f} ± {value['loss_sem']:.4f}"),
                    Figures(f"{value['error_mean']:.2f} ± {value['error_sem']:.2f}"),
                    Figures(str(value["runs"])),
                    Figures(f"{sum(known) / len(known) / 1e12:.2f}"),
                    Figures(f"{value['seconds']:.1f}"),
                ]
            )
    section.table(
        ["Setting", "Variant", "Parameters", "Training loss", "Test error, %", "Runs",
         "Training, TFLOP per run", "Seconds, all runs"],
        rows,
    )  # fmt: skip
    section.text(
        "Mean ± standard error in the last epoch; the training loss is the mean over its batches. "
        "Seconds hold training and merit passes; a stretch that variants share counts for each."
    )
    return section


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _decisions(runs: Mapping[str, Sequence[CnnRun]]) -> Section:
    section = Section("Every merit pass: what each norm would choose")
    rows = []
    for name, setting_runs in runs.items():
        for run in setting_runs:
            for variant in run.setting.variants:
                for merit in cnn_results.merit_passes(run, variant.name):
                    rows.append([name, variant.name, Figures(str(run.run)), *_pass_cells(merit)])
    section.table(
        ["Setting", "Variant", "Run", "After epoch", "Rule",
         *(f"Largest in {_NORM_WORDS[n]}" for n in NORMS),
         "Ratio to base (operator)", "Signal-to-noise", "Inserted behind"],
        rows,
    )  # fmt: skip
    section.text(
        f"Merits in the {_NORM_WORDS[NORM]} decide. The ratio is the largest merit over the mean "
        f"merit of the existing convolutions; the relative rule needs at least {TAU:g}. "
        "Signal-to-noise is that of the averaged gradient at the position with the largest merit, "
        "over mini-batches."
    )
    return section


_NORM_WORDS = {
    "operator": "operator norm",
    "frobenius": "Frobenius norm",
    "frobenius_scaled": "Frobenius norm / size",
}


def _pass_cells(merit: MeritPass) -> list[object]:
    chosen = merit.choice(NORM)
    return [
        Figures(str(merit.epoch)),
        merit.rule,
        *(merit.positions[merit.choice(norm)] for norm in NORMS),
        Figures(f"{merit.ratio[NORM]:.2f}"),
        Figures(f"{merit.snr[chosen]:.1f}" if merit.snr else "one batch"),
        "declined" if merit.inserted is None else merit.positions[merit.inserted],
    ]


def _costs(runs: Mapping[str, Sequence[CnnRun]], summary: Mapping[str, Any]) -> Section:
    section = Section("What the merits cost")
    rows = []
    for name, times in summary["merit_pass_milliseconds_per_batch"].items():
        rows.append(
            [
                runs[name][0].setting.title,
                Figures(f"{times['ordinary']:.2f}"),
                Figures(f"{times['driver']:.2f}"),
                Figures(f"{times['authors']:.2f}"),
                Figures(f"{times['authors'] / times['driver']:.2f}"),
                Figures(f"{times['gap']:.1e}"),
            ]
        )
    section.table(
        ["Network", "Ordinary pass, ms", "Ours, ms", "The authors' way, ms",
         "The authors' / ours", "Largest relative difference of merits"],
        rows,
    )  # fmt: skip
    section.text(
        "Per batch, medians of interleaved repetitions on this machine: a forward and backward "
        "without merits; the same recorded by LayerInsertion; the authors' extended network, with "
        "an identity layer behind every convolution and its gradients summed on the host. The "
        "shares of FLOPs and of time in the whole training are among the claims."
    )
    return section


def _how_to(summary: Mapping[str, Any]) -> Section:
    return report.run_again(
        f"growkernels reproduce sensli --net cnn --data DIR --preset {summary['preset']} "
        f"--optimizer {summary['optimizer']['name']} --out FOLDER",
        "the same numbers",
        "Curves and every merit",
    )
