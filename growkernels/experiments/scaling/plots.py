"""The figures of the study of non-uniform scaling, each as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from growkernels.experiments import plot_style as style
from growkernels.experiments.scaling.history import History
from growkernels.experiments.scaling.results import (
    Quantity,
    Results,
    added_by_layer,
    base_layers,
    curve,
    final,
    parameters,
    root,
)
from growkernels.experiments.scaling.settings import Setting, Variant
from growkernels.experiments.statistics import estimate

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
AXIS: dict[Quantity, str] = {"top1": "top-1 accuracy on test images, %", "loss": "training loss"}
WHERE = ("splitting", "s2d", "gradient_sum", "magnitude", "random", "uniform")


def curves(setting: Setting, results: Results, quantity: Quantity) -> bytes:
    """Mean of "top1" or "loss" with a band of one standard error."""
    figure, axes = style.panels(len(CURVE_PANELS), columns=2, size=(5.8, 3.9))
    ends = []
    for ax, (title, shown) in zip(axes, CURVE_PANELS.items(), strict=True):
        for epoch in setting.growth_epochs(setting.variant("splitting")):
            ax.axvline(epoch, color="#bbbbbb", lw=0.7, ls=(0, (3, 3)))
        labels = []
        for name, (label, colour) in shown.items():
            labels.append((_curve(ax, results[name], quantity, colour), label, colour))
        ends.append(labels)
        ax.set_title(title)
        ax.set_xlabel("epoch")
        ax.set_ylabel(f"{AXIS[quantity]}, mean ± SEM of {setting.runs}")
        ax.set_xlim(0, setting.epochs)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.draw_without_rendering()  # the labels are placed in pixels
    for ax, labels in zip(axes, ends, strict=True):
        style.label_ends(ax, labels, setting.epochs)
    return style.png(figure)


def _curve(ax: Axes, runs: Sequence[History], quantity: Quantity, colour: str) -> float:
    table = curve(runs, quantity)
    measured = table.isfinite().any(1).nonzero()[:, 0]
    values = [estimate(row) for row in table[measured]]
    mean, sem = (torch.tensor([getattr(v, key) for v in values]) for key in ("mean", "sem"))
    ax.plot(measured + 1, mean, color=colour)
    ax.fill_between(measured + 1, mean - sem, mean + sem, color=colour, alpha=0.15, lw=0)
    return float(mean[-1])


def accuracy_by_parameters(setting: Setting, results: Results) -> bytes:
    """Final accuracy of every variant against its size, with standard errors."""
    figure, (ax,) = style.panels(1, columns=1, size=(8.2, 4.9))
    points = []
    for variant in setting.variants:
        runs = results[variant.name]
        accuracy, size = estimate(final(runs, "top1")), parameters(runs).mean().item()
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
    ax.set_ylabel(f"{AXIS['top1']}, mean ± SEM of {setting.runs}")
    figure.draw_without_rendering()
    for ends, x in labels:
        style.label_ends(ax, ends, x)
    return style.png(figure)


def _short(value: float, _: object) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"


def spectra(results: Results) -> bytes:
    """Smallest eigenvalues of a layer's neurons at every growth, one panel per kind of layer."""
    runs = results["splitting"]
    layers = base_layers(runs)
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    figure, axes = style.panels(len(kinds), columns=3, size=(4.3, 3.1))
    for ax, kind in zip(axes, kinds, strict=True):
        own = [name for name in layers if name.rpartition(".")[2] == kind]
        colours = colormaps["viridis"](torch.linspace(0, 0.9, len(own)).tolist())
        for number, (name, colour) in enumerate(zip(own, colours, strict=True)):
            steps = runs[0].growth
            values = [torch.tensor(step.scores[step.layers.index(name)]) for step in steps]
            epochs = [step.epoch for step in steps]
            low, middle, high = ([v.quantile(q).item() for v in values] for q in (0.05, 0.5, 0.95))
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


def where_grown(results: Results) -> bytes:
    """Neurons added by layer and time, mean over the runs, a panel per criterion."""
    figure, axes = style.panels(len(WHERE), columns=3, size=(4.3, 4.6))
    for ax, name in zip(axes, WHERE, strict=True):
        runs = results[name]
        layers = base_layers(results["splitting"])
        epochs = sorted({step.epoch for run in runs for step in run.growth})
        added = torch.zeros(len(layers), len(epochs), dtype=torch.float64)
        for run in runs:
            for step in run.growth:
                added[:, epochs.index(step.epoch)] += added_by_layer(step, layers) / len(runs)
        image = ax.imshow(
            added.numpy(), aspect="auto", cmap="Blues", interpolation="nearest", vmin=0
        )
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


def growth_cost(setting: Setting, results: Results) -> bytes:
    """Share of the time that collecting, eigenpairs and surgery take, by variant."""
    names = [v.name for v in setting.variants if v.growth is not None]
    figure, (ax,) = style.panels(1, columns=1, size=(7.6, 3.6))
    left = torch.zeros(len(names), dtype=torch.float64)
    for part, label, colour in (
        ("collect", "collecting inputs and gradients", style.SKY),
        ("score", "scores (eigenpairs)", style.BLUE),
        ("surgery", "selection and surgery", style.ORANGE),
    ):
        shares = torch.tensor([_share(results[name], part) for name in names])
        ax.barh(range(len(names)), shares, left=left, color=colour, label=label, height=0.7)
        left = left + shares
    ax.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    ax.invert_yaxis()
    ax.set_xlabel("% of the time of training and growth")
    ax.legend(fontsize=8.5)
    return style.png(figure)


def _share(runs: Sequence[History], part: str) -> float:
    steps = [step for run in runs for step in run.growth]
    growth = sum(step.seconds for step in steps)
    total = growth + float(curve(runs, "seconds").sum())
    spent: float = sum(getattr(step, f"{part}_seconds") for step in steps)
    return 100 * spent / total
