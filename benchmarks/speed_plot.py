"""The README's picture of the headlines: how many times faster, a bar for every opponent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.headlines import Headline, times
from benchmarks.results import STALE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR_INCHES = 0.19
_GAP = 0.9  # between headlines, in bars
_TICKS = (1, 2, 5, 10, 20, 50, 100)


def draw(headlines: Sequence[Headline], results: Path, path: Path) -> None:
    """Write the picture, whole or not at all, with a panel for every CPU that has results.

    Those of other sources than this checkout's are marked in it.
    Raises what `Headline.speedups` raises for missing results.
    """
    from matplotlib import pyplot as plt

    from growkernels.experiments.plots import STYLE

    speedups = [_by_name(headline.speedups(results)) for headline in headlines]
    machines = sorted({machine for by_machine in speedups for machine in by_machine})
    bars = sum(len(headline.opponents) + _GAP for headline in headlines)
    inches = len(machines) * (bars * _BAR_INCHES + 0.7)
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(machines), 1, figsize=(8.4, inches), squeeze=False, layout="constrained"
        )
        for machine, axes in zip(machines, grid[:, 0], strict=True):
            _panel(axes, headlines, [by_machine.get(machine, {}) for by_machine in speedups])
            axes.set_xlabel(f"times faster than the alternative, on {machine}")
        part = path.with_suffix(".part.png")
        figure.savefig(part, dpi=130, bbox_inches="tight", pad_inches=0.1)
        plt.close(figure)
    os.replace(part, path)


def _by_name(speedups: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """By the machine's name alone; what is stale says so behind the opponent's."""
    named = {}
    for machine, by_opponent in speedups.items():
        name, stale, _ = machine.partition(STALE)
        mark = ", stale" if stale else ""
        named[name] = {f"{opponent}{mark}": ratio for opponent, ratio in by_opponent.items()}
    return named


def _panel(axes: Axes, headlines: Sequence[Headline], speedups: Sequence[dict[str, float]]) -> None:
    from growkernels.experiments.plots import BLUE, GREY, ORANGE

    places, y = [], 0.0
    for by_opponent in speedups:
        places.append(y + (len(by_opponent) - 1) / 2)
        for opponent, ratio in by_opponent.items():
            if opponent.startswith(("torch.compile", "compiled")):
                colour = BLUE
            else:
                colour = ORANGE if opponent.startswith("eager") else GREY
            axes.barh(y, ratio - 1, left=1, height=0.82, color=colour)
            axes.annotate(
                f"{times(ratio)} {opponent}", (ratio, y), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=7.5,
            )  # fmt: skip
            y += 1
        y += _GAP
    names = [f"{headline.what.replace('`', '')}\n{headline.shape}" for headline in headlines]
    axes.set_yticks(places, names, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(y - _GAP, -1)
    axes.grid(axis="y", visible=False)
    axes.set_xscale("log")
    axes.set_xlim(1, 1500)
    axes.set_xticks(_TICKS, [f"{tick}×" for tick in _TICKS])
    axes.minorticks_off()
