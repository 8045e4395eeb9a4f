"""The CNN report's figures, each as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from growkernels.experiments import plot_style as style
from growkernels.experiments.sensli.cnn_claims import sweep
from growkernels.experiments.sensli.cnn_engine import CnnRun
from growkernels.experiments.sensli.cnn_results import curve, final, first_passes, variant_named
from growkernels.experiments.statistics import estimate
from growkernels.growth.layer_insertion import NORMS

LABELS = {
    "small": ("small net", style.GREY),
    "max": ("insert at max", style.BLUE),
    "min": ("insert at min", style.ORANGE),
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


def curves(runs: Mapping[str, Sequence[CnnRun]], quantity: str) -> bytes:
    """Mean of "loss" or "error" with a band of one standard error, a panel per setting."""
    shown = [runs[name] for name in ("cnn_exp5", "cnn_exp9", "cnn_exp1")]
    figure, axes = style.panels(len(shown), columns=len(shown), size=(4.9, 3.6))
    ends = [
        _curve_panel(ax, setting_runs, quantity)
        for ax, setting_runs in zip(axes, shown, strict=True)
    ]
    figure.draw_without_rendering()  # the labels are placed in pixels
    for ax, setting_runs, labels in zip(axes, shown, ends, strict=True):
        style.label_ends(ax, labels, setting_runs[0].setting.epochs)
    return style.png(figure)


def _curve_panel(ax: Axes, runs: Sequence[CnnRun], quantity: str) -> list[tuple[float, str, str]]:
    setting = runs[0].setting
    epochs = torch.arange(1, setting.epochs + 1)
    ends: list[tuple[float, str, str]] = []
    tries: set[int] = set()
    for name in (variant.name for variant in setting.variants):
        values = curve(runs, name, quantity)
        count = int(values[-1].isfinite().sum())
        if count == 0:
            continue
        label, colour = LABELS[name]
        mean = values.nanmean(1)
        spread = torch.stack([torch.tensor(estimate(row).sem) for row in values])
        ax.plot(epochs, mean, color=colour)
        ax.fill_between(epochs, mean - spread, mean + spread, color=colour, alpha=0.15, lw=0)
        ends.append((mean[-1].item(), label, colour))
        tries.update(attempt.epoch for attempt in variant_named(setting, name).attempts)
    for epoch in tries:
        ax.axvline(epoch, color="#999999", lw=0.8, ls=(0, (3, 3)))
    ax.set_xlim(1, setting.epochs)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"{setting.name}: {setting.title}", fontsize=9.5)
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"{AXIS[quantity]}, mean ± SEM of {len(runs)}")
    return ends


def merits(runs: Mapping[str, Sequence[CnnRun]]) -> bytes:
    """Merits at each run's first attempt in three norms, relative to the existing convolutions'."""
    shown = [runs["cnn_exp5"], runs["cnn_exp9"]]
    figure, axes = style.panels(len(shown), columns=len(shown), size=(5.4, 3.7))
    for ax, setting_runs in zip(axes, shown, strict=True):
        passes = first_passes(setting_runs)
        count = len(passes[0].positions)
        for norm in NORMS:
            label, colour, marker = NORM_LABELS[norm]
            ratios = torch.tensor([p.merits[norm] for p in passes]) / torch.tensor(
                [[p.base[norm]] for p in passes]
            )
            for row in ratios:
                ax.plot(range(count), row, color=colour, lw=0.7, alpha=0.45, zorder=1)
            mean = ratios.log().mean(0).exp()
            ax.plot(range(count), mean, color=colour, marker=marker, ms=5, label=label, zorder=3)
        ax.axhline(1, color="#999999", lw=0.8, ls=(0, (3, 3)))
        ax.set_yscale("log")
        ax.set_xticks(range(count), [place.replace(", ", "\n") for place in passes[0].positions])
        ax.set_xlim(-0.3, count - 0.7)
        setting = setting_runs[0].setting
        ax.set_title(f"{setting.name}: {setting.title}", fontsize=9.5)
        ax.set_ylabel("merit / mean merit of existing convolutions")
        ax.legend(fontsize=8.5)
    return style.png(figure)


def insertion_times(runs: Sequence[CnnRun]) -> bytes:
    """Final training loss and test error against the epoch of the insertion."""
    setting = runs[0].setting
    figure, axes = style.panels(2, columns=2, size=(4.9, 3.6))
    epochs, _, inserted = sweep(runs)
    names = [variant.name for variant in setting.variants if variant.attempts]
    for ax, quantity in zip(axes, ("loss", "error"), strict=True):
        values = torch.stack([final(runs, name, quantity) for name in names])
        for column in range(len(runs)):
            for row, epoch in enumerate(epochs):
                filled = style.SKY if inserted[row, column] else "none"
                ax.scatter(
                    epoch,
                    values[row, column],
                    s=22,
                    facecolor=filled,
                    edgecolor=style.SKY,
                    zorder=2,
                )
        ax.plot(epochs, values.nanmean(1), color=style.BLUE, marker="o", ms=5, zorder=3)
        small = estimate(final(runs, "small", quantity))
        ax.axhline(small.mean, color=style.GREY, lw=1.2)
        ax.axhspan(small.mean - small.sem, small.mean + small.sem, color=style.GREY, alpha=0.13)
        ax.annotate(
            "small net, no insertion", (0, small.mean), xycoords=("axes fraction", "data"),
            xytext=(4, 3), textcoords="offset points", va="bottom", color=style.GREY, fontsize=8.5,
        )  # fmt: skip
        ax.set_xticks(epochs)
        ax.set_xlabel(f"insertion after epoch (of {setting.epochs})")
        ax.set_ylabel(f"final {AXIS[quantity]}")
        ax.set_title(f"{setting.name}: {setting.title}", fontsize=9.5)
    return style.png(figure)
