"""The study's figures, each as PNG bytes."""

from __future__ import annotations

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from growkernels.experiments import plot_style as style
from growkernels.experiments.basis.claims import NAMES
from growkernels.experiments.basis.results import Study, agreement, costs_at
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    BY_TAYLOR,
    BY_TRAINING,
    DENSE,
    EVERYWHERE,
    FULL_FIRST,
    VARIANTS,
)
from growkernels.experiments.statistics import estimate

COLOURS = {
    DENSE: style.GREY,
    EVERYWHERE: style.RED,
    BY_TRAINING: style.ORANGE,
    BY_TAYLOR: style.BLUE,
    BASIS_FIRST: style.PINK,
    FULL_FIRST: style.GREEN,
}
AXIS = {"loss": "training loss", "accuracy": "test accuracy, %"}


def curves(study: Study) -> bytes:
    """Mean training loss and test accuracy with bands of one standard error."""
    figure, axes = style.panels(2, columns=2, size=(5.6, 3.9))
    epochs = torch.arange(1, study.settings.epochs + 1)
    ends = []
    for ax, quantity in zip(axes, ("loss", "accuracy"), strict=True):
        labels = []
        for variant in VARIANTS:
            values, colour = study.curve(variant, quantity), COLOURS[variant]
            mean = values.nanmean(1)
            spread = torch.tensor([estimate(row).sem for row in values])
            ax.plot(epochs, mean, color=colour)
            ax.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
            labels.append((mean[-1].item(), NAMES[variant], colour))
        ends.append(labels)
        switch = round(study.settings.switch * study.settings.epochs)
        ax.axvline(switch, color="#999999", lw=0.8, ls=(0, (3, 3)))
        ax.set_xlim(1, max(2, study.settings.epochs))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
        ax.set_ylabel(f"{AXIS[quantity]}, mean ± SEM of {study.settings.runs}")
    figure.draw_without_rendering()  # the labels are placed in pixels
    for ax, labels in zip(axes, ends, strict=True):
        style.label_ends(ax, labels, study.settings.epochs)
    return style.png(figure)


def time_and_accuracy(study: Study) -> bytes:
    """Every variant's accuracy against its time per epoch, both relative to dense."""
    figure, (ax,) = style.panels(1, columns=1, size=(7.6, 4.0))
    for variant, marker in zip(VARIANTS, "soDv^P", strict=True):
        gain, colour = study.gain(variant, DENSE), COLOURS[variant]
        low, middle, high = (100 * ratio for ratio in study.time_ratio(variant))
        ax.errorbar(
            middle, gain.mean, yerr=gain.sem, xerr=[[middle - low], [high - middle]], fmt=marker,
            color=colour, capsize=2.5, ms=6, label=NAMES[variant],
        )  # fmt: skip
    ax.axhline(0, color="#999999", lw=0.8, ls=(0, (3, 3)))
    ax.margins(x=0.1, y=0.15)
    ax.set_xlabel("time per epoch, % of dense (median and quartiles)")
    ax.set_ylabel("test accuracy against dense,\npercentage points (mean ± SEM)")
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    return style.png(figure)


def sensitivities(study: Study) -> bytes:
    """Both methods' costs per layer, and one against the other."""
    search, settings = study.search, study.settings
    paths = list(search.by_training.costs)
    trained = [next(iter(search.by_training.costs[path].values())) for path in paths]
    errors = [next(iter(search.by_training.errors[path].values())) for path in paths]
    shares = len(settings.fractions)
    predicted = numpy.array([costs_at(search, path, shares) for path in paths])
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
    found, chance = agreement(search, share, shares)
    right.set_title(f"rank correlation {found:+.2f} (p = {chance:.3f})")
    right.set_xlabel("predicted increase of the loss")
    right.set_ylabel("accuracy lost in training, points")
    return style.png(figure)


def plans(study: Study) -> bytes:
    """The network, layer by layer as wide as its time; filled as far as its filters are basis."""
    shown = (EVERYWHERE, BY_TRAINING, BY_TAYLOR)
    figure, (ax,) = style.panels(1, columns=1, size=(10.5, 3.4))
    times = study.search.times
    full_ranks = _output_channels(study)
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
    ax.set_yticks(range(len(shown)), [NAMES[variant] for variant in shown])
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


def _output_channels(study: Study) -> dict[str, int]:
    """Of the candidate layers, from the plan that has the same fraction everywhere."""
    plan = study.plan(EVERYWHERE)
    return {path: round(rank / study.settings.fraction) for path, rank in plan.items()}
