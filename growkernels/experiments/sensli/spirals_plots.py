"""The SensLI report's figures, each as PNG bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import LogLocator

from growkernels.experiments import plots as style
from growkernels.experiments.models.batched import BatchedNetwork
from growkernels.experiments.sensli.engine import SettingRun, lineages_of, setting_data
from growkernels.experiments.sensli.settings import Setting
from growkernels.experiments.sensli.spirals_study import curve
from growkernels.experiments.statistics import estimate
from growkernels.experiments.table import values

if TYPE_CHECKING:
    from growkernels.experiments.sensli.spirals_conclusion import SpiralsEvidence

COLOURS = {
    "small": style.GREY,
    "max": style.BLUE,
    "min": style.ORANGE,
    "random": style.PINK,
    "scratch": style.BLACK,
    "large": style.GREEN,
}
LABELS = {
    "small": "small net",
    "max": "insert at max",
    "min": "insert at min",
    "random": "insert at random",
    "scratch_1": "final net from scratch",
    "large": "large net",
    "max_3": "3 × max",
    "min_3": "3 × min",
    "random_3": "3 × random",
    "scratch_3": "final net from scratch",
}


def loss_curves(
    evidence: SpiralsEvidence, runs: Sequence[SettingRun], names: Sequence[str]
) -> bytes:
    """Mean training loss with a band of one standard error, a panel per setting.

    Inserting variants are drawn from where they leave the small net's curve.
    """
    panels = []
    for setting in (run.setting for run in runs):
        inserting = [setting.variant(name) for name in names if setting.has(name)]
        looks = {name: (label, _colour(name)) for name, label in _distinct(setting, names)}
        panels.append(
            style.Panel(
                f"{setting.name}: {setting.title}", looks, setting.epochs, "loss", "training loss",
                setting.name,
                marks=sorted({i.epoch for variant in inserting for i in variant.insertions}),
                begins={v.name: v.insertions[0].epoch for v in inserting if v.insertions},
            )
        )  # fmt: skip
    return style.curves(evidence.table, panels, size=(5.6, 3.5), adjust=_logarithmic)


def _logarithmic(ax: Axes) -> None:
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    subs = (1, 2, 3, 4, 5, 6, 7, 8) if high < 8 * low else (1, 2, 5)  # no more than fit
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=subs))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("")


def _distinct(setting: Setting, names: Sequence[str]) -> list[tuple[str, str]]:
    """(variant, label): variants that are one and the same training share a curve."""
    curves: dict[tuple[object, ...], list[str]] = {}
    for name in names:
        if setting.has(name):
            curves.setdefault(tuple(lineages_of(setting.variant(name))), []).append(name)
    labels = []
    for same in curves.values():
        if {"max", "min", "random"} <= set(same):
            labels.append((same[0], "insert (one position)"))
        elif {"scratch_1", "large"} <= set(same) or {"scratch_3", "large"} <= set(same):
            labels.append((same[0], "large = final net from scratch"))
        else:
            labels.append((same[0], LABELS[same[0]]))
    return labels


def _colour(name: str) -> str:
    return COLOURS[name.split("_")[0]]


def merit_positions(runs: Sequence[SettingRun]) -> bytes:
    """Merits of every run at the first insertion, and how often each position was chosen."""
    figure, axes = style.panels(len(runs), columns=2, size=(5.0, 3.2))
    for ax, run in zip(axes, runs, strict=True):
        merits, positions, _ = run.insertions[_last_lineage(run, "max")]
        merits, positions = merits.double().cpu(), positions.cpu()
        count = merits.shape[1]
        for row in merits:
            ax.plot(range(count), row, color=style.SKY, lw=0.7, alpha=0.6, zorder=1)
        ax.plot(range(count), merits.log().mean(0).exp(), color=style.BLUE, marker="o", zorder=3)
        ax.set_yscale("log")
        shares = [int((positions == p).sum()) for p in range(count)]
        ax.set_xticks(
            range(count),
            [
                f"after layer {p + 1}\nlargest in {share} of {len(positions)}"
                for p, share in enumerate(shares)
            ],
        )
        ax.set_xlim(-0.35, count - 0.65)
        ax.set_title(f"{run.setting.name}: {run.setting.title}")
        ax.set_ylabel("merit ‖∂L/∂W‖²")
    return style.png(figure)


def insertion_times(evidence: SpiralsEvidence, runs: Sequence[SettingRun]) -> bytes:
    """Final training loss against the insertion epoch, with the fixed nets as bands."""
    figure, axes = style.panels(len(runs), columns=len(runs), size=(5.0, 3.5))
    labels = []
    for ax, run in zip(axes, runs, strict=True):
        times = evidence.times(run.setting)
        points = [estimate(losses) for losses in times.values()]
        ax.errorbar(
            list(times), [p.mean for p in points], [p.sem for p in points],
            color=style.BLUE, marker="o", ms=4.5, capsize=2.5,
        )  # fmt: skip
        ends = []
        for name in ("small", "scratch_1"):
            fixed = estimate(values(evidence.runs(run.setting.name, name, "loss")))
            style.level(ax, fixed, _colour(name))
            ends.append((fixed.mean, LABELS[name], _colour(name)))
        labels.append(ends)
        ax.set_ylim(0)
        ax.set_title(f"{run.setting.name}: {run.setting.title}", fontsize=9.5)
        ax.set_xlabel(f"insertion epoch (of {run.setting.epochs})")
        ax.set_ylabel("final training loss")
    figure.draw_without_rendering()
    for ax, ends in zip(axes, labels, strict=True):
        style.label_ends(ax, ends, ax.get_xlim()[1])
    return style.png(figure)


def decision_boundaries(run: SettingRun, variant: str = "max") -> bytes:
    """The median run's class probability: at the insertion, and at the end with and without it."""
    losses = curve(run, variant)[-1]
    index = int(losses.argsort()[len(losses) // 2])
    lineage = _last_lineage(run, variant)
    epoch = run.lineages[lineage][-1].step
    small = run.lineages.index(lineages_of(run.setting.variant("small"))[0])
    views = [
        (f"epoch {epoch}: just before the insertion", run.insertions[lineage][2], epoch, variant),
        (f"epoch {run.setting.epochs}: one layer inserted", run.network(lineage), -1, variant),
        (f"epoch {run.setting.epochs}: nothing inserted", run.network(small), -1, "small"),
    ]
    figure, axes = style.panels(len(views), columns=len(views), size=(3.9, 4.1))
    for ax, (title, network, at, name) in zip(axes, views, strict=True):
        _boundary(ax, run, network, index)
        loss = curve(run, name)[at, index].item()
        error = curve(run, name, "error")[at, index].item()
        ax.set_title(f"{title}\nloss {loss:.3f}, test error {error:.1f} %", fontsize=9.5)
    return style.png(figure)


def _last_lineage(run: SettingRun, variant: str) -> int:
    return run.lineages.index(lineages_of(run.setting.variant(variant))[-1])


def _boundary(ax: Axes, run: SettingRun, network: BatchedNetwork, index: int) -> None:
    side = torch.linspace(-1.7, 1.7, 240, device="cpu")
    y, x = torch.meshgrid(side, side, indexing="ij")
    grid = torch.stack((x.flatten(), y.flatten()))[None].to(run.device, run.dtype)
    one = network.select(torch.tensor([index], device=run.device))
    probability = one.forward(grid).logits[0].softmax(0)[1].view(240, 240).cpu()
    shades = LinearSegmentedColormap.from_list("classes", [style.ORANGE, "white", style.BLUE])
    ax.imshow(
        probability, extent=(-1.7, 1.7, -1.7, 1.7), origin="lower", cmap=shades, vmin=0, vmax=1,
        alpha=0.45,
    )  # fmt: skip
    ax.contour(side, side, probability, levels=[0.5], colors=style.BLACK, linewidths=1.1)
    data = setting_data(run.setting)
    for label, colour in ((0, style.RED), (1, style.BLUE)):
        points = data.train_points[data.train_labels == label]
        ax.scatter(points[:, 0], points[:, 1], s=5, color=colour, lw=0)
    ax.set(xlabel="x₁", ylabel="x₂", aspect="equal")
    ax.grid(visible=False)
