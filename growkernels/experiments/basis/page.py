"""The study's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from growkernels.experiments import report
from growkernels.experiments.basis import plots
from growkernels.experiments.basis.claims import NAMES, RULE
from growkernels.experiments.basis.results import TIMED_IMAGES, Study
from growkernels.experiments.basis.settings import BY_TAYLOR, BY_TRAINING, DENSE, VARIANTS
from growkernels.experiments.image_study import LOSSY_IMAGES, is_lossy
from growkernels.experiments.report import Figures, Plot, Section
from growkernels.experiments.statistics import Claim

TITLE = "Basis convolutions in ResNet-18: which layers, how many filters, which epochs"

DEVIATIONS = (
    "What could be read of the paper names ResNet-18, CIFAR-10, SGD and cosine annealing. Its "
    "fraction of basis filters, selected layers, threshold of the selection, lengths of the skip "
    "schedules, stem, batch, learning rate, epochs and number of runs could not be found. Here: "
    "half of the filters, a 3x3 stem without pooling, and the usual recipe for this network.",
    "Basis convolutions take the place of 3x3 convolutions; the stem and the 1x1 shortcuts stay.",
    "A network with basis convolutions starts from the best approximation of the dense network's "
    "random kernels, so that runs of one number start as alike as they can.",
    "The search by training compares accuracies on images held out of the training images, not on "
    "the test images, from starts that the final trainings do not use.",
    "The paper picks the tolerant layers by eye or threshold; here both methods' costs go to the "
    "same planner, which reaches one target for the time of a step at least total cost. The search "
    "by training knows one number of basis filters per layer, the Taylor search several.",
    "At a switch the weights and the momentum are carried over: to full kernels exactly, to basis "
    "convolutions by the best approximation. One summary of the paper says that networks are "
    "re-initialised there instead.",
)


def draw_plots(study: Study) -> dict[str, Plot]:
    """All figures, by file name."""
    return {
        "time_and_accuracy": Plot(
            plots.time_and_accuracy(study),
            "What basis convolutions save and cost. Time is that of training steps of the "
            "full-width network, all variants taking turns in one process; a skip schedule's is "
            "the mean over its epochs.",
        ),
        "plans": Plot(
            plots.plans(study),
            "The chosen layers. A layer is as wide as the time of its full convolution and is "
            "filled as far as its filters are basis filters; grey layers keep their kernels.",
        ),
        "sensitivities": Plot(
            plots.sensitivities(study),
            "What replacing one layer costs, measured by a short training per layer (the paper's "
            "way; bars show one standard error over the starts if there are several) and "
            "predicted by a Taylor expansion from one pass over some training images.",
        ),
        "training_curves": Plot(
            plots.curves(study),
            "Training loss and test accuracy; bands show one standard error over the runs, the "
            "dashed line where skip schedules change over.",
        ),
    }


def render(
    study: Study,
    claims: Sequence[Claim],
    drawn: Mapping[str, Plot],
    summary: Mapping[str, Any],
) -> str:
    """The whole page."""
    sections = [
        _conditions(study, summary),
        report.pictures(drawn),
        _final_values(summary),
        _search(study, summary),
        report.differences(DEVIATIONS),
        _how_to(summary),
    ]
    return report.render(TITLE, summary["overview"], claims, RULE, sections, summary["environment"])


def _conditions(study: Study, summary: Mapping[str, Any]) -> Section:
    section = Section("Under which conditions")
    data, recipe, settings = summary["data"], study.settings.recipe, study.settings
    section.text(
        f"Data: {data['name']}, {data['train_images']:,} training and {data['test_images']:,} test "
        f"images of {data['size']} pixels; random crops (padding {recipe.crop_padding}) and "
        "mirroring."
    )
    if "synthetic" in data["name"]:
        section.text(
            "The images are synthetic: shapes filled with gratings on a cluttered background, "
            "generated for runs without a data set. Their accuracies say nothing about CIFAR-10."
        )
    if is_lossy(data):
        section.text(LOSSY_IMAGES)
    section.text(
        f"ResNet-18 with {recipe.width} channels in the first stage; SGD, learning rate "
        f"{recipe.rate:g} on a cosine, momentum {recipe.momentum:g}, weight decay "
        f"{recipe.weight_decay:g}, batches of {recipe.batch}, {settings.epochs} epochs, "
        f"{settings.search_epochs} in the search"
        f"{', bfloat16 autocast' if recipe.autocast else ''}. Skip schedules change over after "
        f"{round(settings.switch * settings.epochs)} epochs and have basis convolutions everywhere "
        "in their part."
    )
    if summary["reduced"]:
        section.text(summary["reduced"])
    return section


def _final_values(summary: Mapping[str, Any]) -> Section:
    section = Section("Time and accuracy against dense")
    rows = []
    for variant in VARIANTS:
        value = summary["variants"][variant]
        low, middle, high = value["time_per_epoch_against_dense"]
        gain = "–"
        if variant != DENSE:
            gain = (
                f"{value['accuracy_against_dense_mean']:+.2f} ± "
                f"{value['accuracy_against_dense_sem']:.2f}"
            )
        rows.append(
            [
                NAMES[variant],
                Figures(f"{value['parameters']:,}"),
                Figures(f"{value['seconds_per_epoch']:.1f}"),
                Figures(f"{middle:.3f} ({low:.3f} to {high:.3f})"),
                Figures(f"{value['accuracy_mean']:.2f} ± {value['accuracy_sem']:.2f}"),
                Figures(gain),
                Figures(f"{value['loss_mean']:.4f} ± {value['loss_sem']:.4f}"),
                Figures(str(value["runs"])),
            ]
        )
    section.table(
        ["Variant", "Parameters", "Seconds per epoch", "Relative to dense (quartiles)",
         "Test accuracy, %", "Against dense, points", "Training loss", "Runs"],
        rows,
    )  # fmt: skip
    timing = summary["timing"]
    section.text(
        "Seconds per epoch: median time of a training step (forward, backward, SGD) of a ResNet-18 "
        f"with {timing['width']} channels in the first stage on {timing['batch']} images of "
        f"{timing['image_size']} pixels, scaled to {TIMED_IMAGES:,} images. All variants take "
        f"turns in one process, {timing['rounds']} times; the ratio is taken round by round. "
        "Parameters and accuracies are those of the network that was trained. Mean ± standard "
        "error over the runs; against dense from the paired differences."
    )
    return section


def _search(study: Study, summary: Mapping[str, Any]) -> Section:
    section = Section("The search: every layer, both methods")
    settings, search = study.settings, study.search
    times = search.times
    rows = []
    for path, costs in search.by_training.costs.items():
        ((rank, trained),) = costs.items()
        predicted = sorted(search.by_taylor.costs[path].items())
        chosen = [study.plan(method).get(path) for method in (BY_TRAINING, BY_TAYLOR)]
        rows.append(
            [
                path,
                Figures(f"{1e3 * times.full[path]:.2f}"),
                Figures(f"{times.basis[path][rank] / times.full[path]:.2f}"),
                Figures(f"{trained:+.2f}"),
                *(Figures(f"{cost:+.4f}") for _, cost in predicted),
                *(Figures("full" if r is None else str(r)) for r in chosen),
            ]
        )
    section.table(
        ["Layer", "Full, ms", f"Time at {settings.fraction:g}", "By training, points",
         *(f"By Taylor, {fraction:g}" for fraction in settings.fractions),
         "Filters chosen by training", "by Taylor"],
        rows,
    )  # fmt: skip
    found = summary["search"]
    correlations = "; ".join(
        f"{fraction}: {value['spearman']:+.2f} (p = {value['p']:.3f})"
        for fraction, value in found["rank_correlation"].items()
        if value["spearman"] is not None
    )
    target = (
        "basis convolutions everywhere save no time on this machine, so the plans save parameters"
        if search.ratio is None
        else f"the plans bring a step to {search.ratio:.3f} of the dense network's time or less"
    )
    section.text(
        "Times are forward and backward of the single layer at full width, that of its basis form "
        "relative to the full one. By training: accuracy lost on held-out images after a short "
        f"training, {settings.search_runs} start(s). By Taylor: predicted increase of the loss, by "
        f"fraction of basis filters. Rank correlation with the search by training: {correlations}. "
        f"Cost: {found['by_training']['seconds']:.1f} s of one core or GPU for the search by "
        f"training; {found['by_taylor']['seconds']:.1f} s for the Taylor pass and "
        f"{found['taylor_training_seconds']:.1f} s for the training of the network it expands "
        f"about. Target: {target}."
    )
    return section


def _how_to(summary: Mapping[str, Any]) -> Section:
    data = "" if "synthetic" in summary["data"]["name"] else " --data DIR"
    return report.run_again(
        f"growkernels reproduce basis --preset {summary['preset']}{data} --out FOLDER",
        "the same numbers, measured times aside",
        "Curves",
    )
