"""The plots that studies share, in one look: quiet axes, colours that colour-blind readers know."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # the backend has to be chosen first
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from growkernels.experiments.statistics import Estimate, estimate
from growkernels.experiments.table import Table

# Okabe and Ito, "Color Universal Design" (2008).
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, GREY, BLACK = "#56B4E9", "#D55E00", "#7F7F7F", "#222222"

DPI = 150
STYLE: Any = {  # matplotlib types this as a dict of literal keys
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.7,
    "legend.frameon": False,
    "savefig.facecolor": "white",
    "figure.constrained_layout.use": True,
}


def panels(count: int, columns: int, size: tuple[float, float] = (4.6, 3.4)) -> tuple[Figure, Any]:
    """A figure with ``count`` panels in rows of ``columns`` (inches per panel); a flat list."""
    rows = -(-count // columns)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False
        )
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, axes[:count]


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], x: float) -> None:
    """Names curves at their right ends (y, text, colour), moved apart where they would overlap."""
    scale = axes.transData
    pixels_per_point = axes.figure.dpi / 72
    ends = sorted(ends)
    wanted = [float(scale.transform((x, y))[1]) for y, *_ in ends]
    placed = moved_apart(wanted, 10.5 * pixels_per_point)
    for (y, text, colour), want, place in zip(ends, wanted, placed, strict=True):
        axes.annotate(
            text, (x, y), xytext=(7, (place - want) / pixels_per_point),
            textcoords="offset points", va="center", color=colour, fontsize=8.5,
            annotation_clip=False,
        )  # fmt: skip


def moved_apart(positions: Sequence[float], gap: float) -> list[float]:
    """The nearest places, in least squares, for ascending positions at least ``gap`` apart.

    Without their gaps the places only have to ascend: isotonic regression, whose solution averages
    neighbours that are out of order.
    """
    blocks: list[tuple[float, int]] = []  # (mean, members)
    for number, position in enumerate(positions):
        mean, members = position - number * gap, 1
        while blocks and blocks[-1][0] > mean:
            other, more = blocks.pop()
            mean = (mean * members + other * more) / (members + more)
            members += more
        blocks.append((mean, members))
    means = [mean for mean, members in blocks for _ in range(members)]
    return [mean + number * gap for number, mean in enumerate(means)]


def png(figure: Figure) -> bytes:
    """The figure as a PNG of DPI dots per inch; closes it."""
    buffer = io.BytesIO()
    with plt.rc_context(STYLE):
        # A fixed date-free header: equal numbers give equal files.
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


@dataclass(frozen=True)
class Plot:
    """A picture and what it shows."""

    png: bytes
    caption: str


Looks = Mapping[str, tuple[str, str]]  # variant -> (label, colour)


@dataclass(frozen=True)
class Panel:
    """Curves of a quantity for some variants of a setting, ``label`` at the axis.

    ``marks`` are dashed lines; ``begins`` says from which epoch on a variant is drawn.
    """

    title: str
    looks: Looks
    epochs: int
    quantity: str
    label: str
    setting: str = ""
    marks: Sequence[float] = ()
    begins: Mapping[str, int] = field(default_factory=dict)


def curves(
    table: Table,
    shown: Sequence[Panel],
    *,
    columns: int = 2,
    size: tuple[float, float] = (5.6, 3.7),
    adjust: Callable[[Axes], None] | None = None,
) -> bytes:
    """Means over the runs against epochs, with bands of one standard error."""
    figure, axes = panels(len(shown), columns, size)
    ends: list[list[tuple[float, str, str]]] = []
    for ax, panel in zip(axes, shown, strict=True):
        labels = []
        runs = 0
        for variant, (text, colour) in panel.looks.items():
            curve = table.curve(variant, panel.quantity, panel.setting)
            curve = curve[curve.notna().any(axis=1)]
            curve = curve[curve.index >= panel.begins.get(variant, 0)]
            if curve.empty:
                continue
            runs = max(runs, curve.shape[1])
            points = [estimate(row) for row in curve.to_numpy()]
            band(ax, curve.index.to_numpy(), points, colour)
            labels.append((points[-1].mean, text, colour))
        ends.append(labels)
        for mark in panel.marks:
            ax.axvline(mark, color="#999999", lw=0.8, ls=(0, (3, 3)))
        ax.set_title(panel.title, fontsize=9.5)
        ax.set_xlim(0, panel.epochs)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
        ax.set_ylabel(f"{panel.label}, mean ± SEM of {runs}")
        if adjust is not None:
            adjust(ax)
    figure.draw_without_rendering()  # the labels are placed in pixels
    for ax, panel, labels in zip(axes, shown, ends, strict=True):
        label_ends(ax, labels, panel.epochs)
    return png(figure)


def band(
    ax: Axes, x: Any, points: Sequence[Estimate], colour: str, label: str | None = None
) -> None:
    mean, sem = ([getattr(p, key) for p in points] for key in ("mean", "sem"))
    low, high = ([m + sign * s for m, s in zip(mean, sem, strict=True)] for sign in (-1, 1))
    ax.plot(x, mean, color=colour, label=label)
    ax.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)


def level(ax: Axes, value: Estimate, colour: str) -> None:
    """A mean with its standard error as a line across the whole plot."""
    ax.axhline(value.mean, color=colour, lw=1.2)
    ax.axhspan(value.mean - value.sem, value.mean + value.sem, color=colour, alpha=0.13)
