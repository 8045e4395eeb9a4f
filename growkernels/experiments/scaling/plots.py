"""The figures of the study of non-uniform scaling, each as PNG bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from matplotlib import colormaps
from matplotlib.ticker import FuncFormatter, MaxNLocator

from growkernels.experiments import plots as style
from growkernels.experiments.scaling.growing import root
from growkernels.experiments.scaling.settings import Variant
from growkernels.experiments.statistics import estimate
from growkernels.experiments.table import values

if TYPE_CHECKING:
    from growkernels.experiments.scaling.conclusion import ScalingEvidence

# Title, and the variants in it: label, colour.
CURVE_PANELS: dict[str, dict[str, tuple[str, str]]] = {
    "sizes": {
        "reduced": ("reduced", style.GREY),
        "even_start": ("evenly reduced", style.ORANGE),
        "splitting": ("grown, small", style.SKY),
        "splitting_large": ("grown, large", style.BLUE),
        "homogeneous": ("full", style.BLACK),
    },
    "criteria, at the small size": {
        "splitting": ("splitting", style.BLUE),
        "s2d": ("S2D's own", style.RED),
        "gradient_sum": ("gradient sum", style.ORANGE),
        "magnitude": ("magnitude", style.PINK),
        "random": ("random", style.GREY),
        "uniform": ("even", style.GREEN),
    },
}
COLOURS = {
    name: colour for panel in reversed(CURVE_PANELS.values()) for name, (_, colour) in panel.items()
}
AXIS = {"top1": "top-1 accuracy on test images, %", "loss": "training loss"}
WHERE = ("splitting", "s2d", "gradient_sum", "magnitude", "random", "uniform")


def base_layers(evidence: ScalingEvidence) -> list[str]:
    """Layers of the base network, in order."""
    grown = evidence.growth["splitting"]
    return list(dict.fromkeys(root(name) for run in grown for name in run[0]["layers"]))


def training_curves(evidence: ScalingEvidence, quantity: str) -> bytes:
    """Mean of "top1" or "loss" with a band of one standard error."""
    setting = evidence.setting
    marks = setting.growth_epochs(setting.variant("splitting"))
    panels = [
        style.Panel(title, looks, setting.epochs, quantity, AXIS[quantity], marks=marks)
        for title, looks in CURVE_PANELS.items()
    ]
    return style.curves(evidence.table, panels)


def accuracy_by_parameters(evidence: ScalingEvidence) -> bytes:
    """Final accuracy of every variant against its size, with standard errors."""
    figure, (ax,) = style.panels(1, columns=1, size=(8.2, 4.9))
    points = []
    for variant in evidence.setting.variants:
        accuracy = estimate(values(evidence.runs("", variant.name, "top1")))
        size = float(evidence.parameters(variant.name).mean())
        colour = COLOURS.get(variant.name, style.GREEN)
        points.append((accuracy.mean, accuracy.sem, size, variant, colour))
    largest = max(size for _, _, size, *_ in points)
    # Variants of about one size would hide one another's errors: they stand side by side, in order
    # of their accuracies, and are labelled as one column.
    columns: dict[int, list[tuple[float, float, float, Variant, str]]] = {}
    for point in sorted(points, key=lambda point: point[0]):
        columns.setdefault(round(20 * point[2] / largest), []).append(point)
    labels = []
    for column in columns.values():
        ends = []
        for number, (mean, error, size, variant, colour) in enumerate(column):
            x = size + (number - (len(column) - 1) / 2) * 0.008 * largest
            marker = "s" if variant.growth is None else "o"
            ax.errorbar(x, mean, yerr=error, fmt=marker, ms=6, color=colour, capsize=2.5)
            ends.append((mean, variant.name.replace("_", " "), colour))
        labels.append((ends, x))
    ax.margins(x=0.04)
    ax.set_xlim(right=largest * 1.13)
    ax.set_xlabel("parameters")
    ax.xaxis.set_major_formatter(FuncFormatter(_short))
    ax.set_ylabel(f"{AXIS['top1']}, mean ± SEM of {evidence.setting.runs}")
    figure.draw_without_rendering()
    for ends, x in labels:
        style.label_ends(ax, ends, x)
    return style.png(figure)


def _short(value: float, _: object) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"


def spectra(evidence: ScalingEvidence) -> bytes:
    """Smallest eigenvalues of a layer's neurons at every growth, one panel per kind of layer."""
    steps = evidence.growth["splitting"][0]
    layers = base_layers(evidence)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    figure, axes = style.panels(len(kinds), columns=3, size=(4.3, 3.1))
    for ax, kind in zip(axes, kinds, strict=True):
        own = [name for name in layers if name.rpartition(".")[2] == kind]
        colours = colormaps["viridis"](numpy.linspace(0, 0.9, len(own)))
        for number, (name, colour) in enumerate(zip(own, colours, strict=True)):
            scores = [step["scores"][step["layers"].index(name)] for step in steps]
            epochs = [step["epoch"] for step in steps]
            low, middle, high = ([numpy.quantile(s, q) for s in scores] for q in (0.05, 0.5, 0.95))
            ax.plot(epochs, middle, color=colour, marker="o", ms=3, label=f"block {number}")
            ax.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
        ax.axhline(0, color="#999999", lw=0.8)
        ax.set_title(kind)
        ax.set_xlabel("epoch")
        ax.set_ylabel("smallest eigenvalue")
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(fontsize=7, ncols=2)
    return style.png(figure)


def where_grown(evidence: ScalingEvidence) -> bytes:
    """Neurons added by layer and time, mean over the runs, a panel per criterion."""
    shown = [name for name in WHERE if name in evidence.growth]
    figure, axes = style.panels(len(shown), columns=3, size=(4.3, 4.6))
    layers = base_layers(evidence)
    for ax, name in zip(axes, shown, strict=True):
        runs = evidence.growth[name]
        epochs = sorted({step["epoch"] for run in runs for step in run})
        added = numpy.zeros((len(layers), len(epochs)))
        for step in (step for run in runs for step in run):
            for layer, count in zip(step["layers"], step["added"], strict=True):
                place = layers.index(root(layer)), epochs.index(step["epoch"])
                added[place] += count / len(runs)
        image = ax.imshow(added, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0)
        ax.grid(visible=False)
        ax.set_title(name.replace("_", " "))
        ax.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs], fontsize=8)
        every = -(-len(layers) // 36)
        ticks = range(0, len(layers), every)
        ax.set_yticks(list(ticks), [_layer_label(layers[i]) for i in ticks], fontsize=7)
        ax.set_xlabel("after epoch")
        axes[0].figure.colorbar(image, ax=ax, shrink=0.7, label="neurons")
    return style.png(figure)


def _layer_label(name: str) -> str:
    """blocks.3.attn.q becomes 3.q."""
    parts = root(name).split(".")
    return f"{parts[1]}.{parts[-1]}"


def growth_cost(evidence: ScalingEvidence) -> bytes:
    """Share of the time that collecting, eigenpairs and surgery take, by variant."""
    names = [v.name for v in evidence.setting.variants if v.growth is not None]
    parts = ("collect", "score", "surgery")
    totals = {
        name: float(evidence.table.curve(name, "seconds").sum().sum())
        + sum(evidence.growth_seconds(name, part) for part in parts)
        for name in names
    }
    figure, (ax,) = style.panels(1, columns=1, size=(7.6, 3.6))
    left = numpy.zeros(len(names))
    for part, label, colour in (
        ("collect", "collecting inputs and gradients", style.SKY),
        ("score", "scores (eigenpairs)", style.BLUE),
        ("surgery", "selection and surgery", style.ORANGE),
    ):
        shares = numpy.array(
            [100 * evidence.growth_seconds(name, part) / total for name, total in totals.items()]
        )
        ax.barh(range(len(names)), shares, left=left, color=colour, label=label, height=0.7)
        left = left + shares
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("% of the time of training and growth")
    ax.legend(fontsize=8.5)
    return style.png(figure)
