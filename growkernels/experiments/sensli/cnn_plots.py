"""The CNN report's figures, each as PNG bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy

from growkernels.experiments import plots as style
from growkernels.experiments.statistics import estimate
from growkernels.experiments.table import values
from growkernels.growth.layer_insertion import NORMS

if TYPE_CHECKING:
    from growkernels.experiments.sensli.cnn_conclusion import CnnEvidence

LABELS = {
    "small": ("small net", style.GREY),
    "max": ("insert at max", style.BLUE),
    "min": ("insert at min", style.ORANGE),
    "random": ("insert at random", style.PINK),
    "large": ("large net", style.GREEN),
    "sensli": ("three attempts", style.BLUE),
    "final": ("final net from scratch", style.BLACK),
}
NORM_LABELS = {
    "operator": ("operator norm (decides)", style.BLUE, "o"),
    "frobenius": ("Frobenius", style.ORANGE, "s"),
    "frobenius_scaled": ("Frobenius / size", style.GREEN, "^"),
}
AXIS = {"loss": "training loss", "error": "test error, %"}


def training_curves(evidence: CnnEvidence, quantity: str) -> bytes:
    """Mean of "loss" or "error" with a band of one standard error, a panel per setting."""
    panels = []
    for name in ("cnn_exp5", "cnn_exp9", "cnn_exp1"):
        setting = evidence.setting(name)
        tries = {attempt.epoch for variant in setting.variants for attempt in variant.attempts}
        looks = {variant.name: LABELS[variant.name] for variant in setting.variants}
        panels.append(
            style.Panel(
                f"{name}: {setting.title}", looks, setting.epochs, quantity, AXIS[quantity], name,
                marks=sorted(tries),
            )
        )  # fmt: skip
    return style.curves(evidence.table, panels, columns=3, size=(4.9, 3.6))


def merits(evidence: CnnEvidence) -> bytes:
    """Merits at each run's first attempt in three norms, relative to the existing convolutions'."""
    shown = [evidence.setting(name) for name in ("cnn_exp5", "cnn_exp9")]
    figure, axes = style.panels(len(shown), columns=len(shown), size=(5.4, 3.7))
    for ax, setting in zip(axes, shown, strict=True):
        passes = list(evidence.first_passes(setting.name).values())
        count = len(passes[0].positions)
        for norm in NORMS:
            label, colour, marker = NORM_LABELS[norm]
            base = numpy.array([[p.base[norm]] for p in passes])
            ratios = numpy.array([p.merits[norm] for p in passes]) / base
            for row in ratios:
                ax.plot(range(count), row, color=colour, lw=0.7, alpha=0.45, zorder=1)
            mean = numpy.exp(numpy.log(ratios).mean(axis=0))
            ax.plot(range(count), mean, color=colour, marker=marker, ms=5, label=label, zorder=3)
        ax.axhline(1, color="#999999", lw=0.8, ls=(0, (3, 3)))
        ax.set_yscale("log")
        ax.set_xticks(range(count), [place.replace(", ", "\n") for place in passes[0].positions])
        ax.set_xlim(-0.3, count - 0.7)
        ax.set_title(f"{setting.name}: {setting.title}", fontsize=9.5)
        ax.set_ylabel("merit / mean merit of existing convolutions")
        ax.legend(fontsize=8.5)
    return style.png(figure)


def insertion_times(evidence: CnnEvidence, name: str) -> bytes:
    """Final training loss and test error against the epoch of the insertion."""
    setting = evidence.setting(name)
    figure, axes = style.panels(2, columns=2, size=(4.9, 3.6))
    inserting = [setting.variant(v) for v in evidence.sweep(name)]
    epochs = [variant.attempts[0].epoch for variant in inserting]
    for ax, quantity in zip(axes, ("loss", "error"), strict=True):
        means = []
        for epoch, variant in zip(epochs, inserting, strict=True):
            finals = evidence.runs(name, variant.name, quantity)
            means.append(estimate(values(finals)).mean)
            for run, value in finals.items():
                filled = style.SKY if evidence.inserted(name, variant.name, run) else "none"
                ax.scatter(epoch, value, s=22, facecolor=filled, edgecolor=style.SKY, zorder=2)
        ax.plot(epochs, means, color=style.BLUE, marker="o", ms=5, zorder=3)
        small = estimate(values(evidence.runs(name, "small", quantity)))
        style.level(ax, small, style.GREY)
        ax.annotate(
            "small net, no insertion", (0, small.mean), xycoords=("axes fraction", "data"),
            xytext=(4, 3), textcoords="offset points", va="bottom", color=style.GREY, fontsize=8.5,
        )  # fmt: skip
        ax.set_xticks(epochs)
        ax.set_xlabel(f"insertion after epoch (of {setting.epochs})")
        ax.set_ylabel(f"final {AXIS[quantity]}")
        ax.set_title(f"{setting.name}: {setting.title}", fontsize=9.5)
    return style.png(figure)
