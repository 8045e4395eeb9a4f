"""The study's figures, each as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from growkernels.experiments import plots as style
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    BY_CHANCE,
    BY_TAYLOR,
    BY_TRAINING,
    DENSE,
    DENSE_SHORTER,
    EVERYWHERE,
    FULL_FIRST,
    ONE_FRACTION,
)
from growkernels.experiments.statistics import estimate, rank_correlation
from growkernels.experiments.table import differences

if TYPE_CHECKING:
    from growkernels.experiments.basis.conclusion import BasisEvidence

COLOURS = {
    DENSE: style.GREY,
    EVERYWHERE: style.RED,
    BY_TRAINING: style.ORANGE,
    BY_TAYLOR: style.BLUE,
    BASIS_FIRST: style.PINK,
    FULL_FIRST: style.GREEN,
    DENSE_SHORTER: style.BLACK,
    ONE_FRACTION: style.SKY,
    BY_CHANCE: "#B8A000",
}
AXIS = {"loss": "training loss", "accuracy": "test accuracy, %"}


def training_curves(evidence: BasisEvidence, names: Mapping[str, str]) -> bytes:
    """Training loss and test accuracy."""
    looks = {
        variant: (names[variant], COLOURS[variant]) for variant in evidence.study.settings.variants
    }
    settings = evidence.study.settings
    marks = (evidence.study.switch,)
    panels = [
        style.Panel("", looks, settings.epochs, quantity, label, marks=marks)
        for quantity, label in AXIS.items()
    ]
    return style.curves(evidence.table, panels)


def accuracy_by_time(evidence: BasisEvidence, names: Mapping[str, str]) -> bytes:
    """Every variant's accuracy after each epoch, against the time that its trainings took."""
    figure, (ax,) = style.panels(1, columns=1, size=(8.2, 4.4))
    for variant in evidence.study.settings.variants:
        seconds = evidence.table.curve(variant, "seconds").cumsum().mean(axis=1)
        accuracy = evidence.table.curve(variant, "accuracy")
        points = [estimate(row) for row in accuracy.to_numpy()]
        style.band(ax, seconds.to_numpy() / 60, points, COLOURS[variant], names[variant])
    ax.set_xlabel("minutes of training")
    ax.set_ylabel(f"{AXIS['accuracy']}, mean ± SEM")
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    return style.png(figure)


def time_and_accuracy(evidence: BasisEvidence, names: Mapping[str, str]) -> bytes:
    """Every variant's accuracy against its time per epoch, both relative to dense."""
    figure, (ax,) = style.panels(1, columns=1, size=(7.6, 4.0))
    for variant, marker in zip(evidence.study.settings.variants, "soDv^PX<>", strict=False):
        accuracies = (evidence.runs("", v, "accuracy") for v in (variant, DENSE))
        gain, colour = estimate(differences(*accuracies)), COLOURS[variant]
        low, middle, high = (100 * ratio for ratio in evidence.time_ratio(variant))
        ax.errorbar(
            middle, gain.mean, yerr=gain.sem, xerr=[[middle - low], [high - middle]], fmt=marker,
            color=colour, capsize=2.5, ms=6, label=names[variant],
        )  # fmt: skip
    ax.axhline(0, color="#999999", lw=0.8, ls=(0, (3, 3)))
    ax.margins(x=0.1, y=0.15)
    ax.set_xlabel("time per epoch, % of dense (median and quartiles)")
    ax.set_ylabel("test accuracy against dense,\npercentage points (mean ± SEM)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    return style.png(figure)


def sensitivities(evidence: BasisEvidence) -> bytes:
    """Both methods' costs per layer, and one against the other."""
    search, settings = evidence.search, evidence.study.settings
    paths = list(search.by_training.costs)
    trained = evidence.costs(settings.fraction)[0]
    errors = [next(iter(search.by_training.errors[path].values())) for path in paths]
    shares = len(settings.fractions)
    predicted = numpy.array([evidence.costs(f)[1] for f in settings.fractions]).T
    figure, (left, middle, right) = style.panels(3, columns=3, size=(4.7, 4.4))
    rows = numpy.arange(len(paths))
    finite = [error == error for error in errors]
    left.barh(rows, trained, color=style.ORANGE, height=0.7)
    if all(finite):
        left.errorbar(trained, rows, xerr=errors, fmt="none", ecolor=style.BLACK, lw=0.9)
    left.set_title(f"by training, {settings.fraction:g} of the filters")
    left.set_xlabel("accuracy lost, percentage points")
    greens = (style.SKY, style.BLUE, style.GREEN, style.GREY)
    height = 0.8 / shares
    for share, fraction in enumerate(settings.fractions):
        offset = (share - (shares - 1) / 2) * height
        middle.barh(
            rows + offset, predicted[:, share], height=height, color=greens[share % 4],
            label=f"{fraction:g} of the filters",
        )  # fmt: skip
    middle.set_title("by Taylor expansion")
    middle.set_xlabel("predicted increase of the loss")
    middle.legend(fontsize=8.5)
    for ax in (left, middle):
        ax.set_yticks(rows, paths, fontsize=7.5)
        ax.invert_yaxis()
        ax.axvline(0, color="#555555", lw=0.8)
    share = settings.fractions.index(settings.fraction)
    right.scatter(predicted[:, share], trained, color=style.BLUE, s=22)
    found, chance, _ = rank_correlation(trained, predicted[:, share])
    right.set_title(f"rank correlation {found:+.2f} (p = {chance:.3f})")
    right.set_xlabel("predicted increase of the loss")
    right.set_ylabel("accuracy lost in training, points")
    return style.png(figure)


def plans(evidence: BasisEvidence, names: Mapping[str, str]) -> bytes:
    """The network, layer by layer as wide as its time; filled as far as its filters are basis."""
    shown = (EVERYWHERE, BY_TRAINING, BY_TAYLOR)
    figure, (ax,) = style.panels(1, columns=1, size=(10.5, 3.4))
    study = evidence.study
    times = evidence.search.times
    # The plan that has the same fraction everywhere tells the numbers of output channels.
    fraction = study.settings.fraction
    full_ranks = {p: round(rank / fraction) for p, rank in study.plan(EVERYWHERE).items()}
    for row, variant in enumerate(shown):
        x, plan = 0.0, study.plan(variant)
        for path, seconds in times.full.items():
            width, share = 1e3 * seconds, plan.get(path, full_ranks[path]) / full_ranks[path]
            _layer(ax, x, row, width, share, COLOURS[variant] if path in plan else style.GREY)
            if row == len(shown) - 1:
                ax.text(
                    x + width / 2, row + 0.62, path, rotation=90, ha="center", va="top",
                    fontsize=7.5,
                )  # fmt: skip
            x += width
    ax.set_xlim(0, x)
    ax.set_ylim(len(shown) + 0.75, -0.55)
    ax.set_yticks(range(len(shown)), [names[variant] for variant in shown])
    ax.grid(visible=False)
    ax.spines[["bottom", "left"]].set_visible(False)
    ax.tick_params(left=False)
    ax.xaxis.set_ticks_position("top")
    ax.set_xlabel("milliseconds of the full convolutions, forward and backward")
    ax.xaxis.set_label_position("top")
    return style.png(figure)


def _layer(ax: Axes, x: float, row: int, width: float, share: float, colour: str) -> None:
    ax.add_patch(Rectangle((x, row - 0.4), width, 0.8, fill=False, ec="#555555", lw=0.7))
    ax.add_patch(Rectangle((x, row + 0.4 - 0.8 * share), width, 0.8 * share, fc=colour, alpha=0.75))
    if share < 1:
        middle = row - 0.4 * share  # of the empty part
        ax.text(x + width / 2, middle, f"{share:.2g}", ha="center", va="center", fontsize=7.5)
