"""Progress bars that also tell something where there is no terminal to draw them on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from growkernels.experiments.study import Stretch

SECONDS_BETWEEN_LINES = 60.0


class LoggedProgress(Progress):
    """Bars on a terminal; in a file or a pipe a line a minute, and the bars once at the end."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._told = time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        now = time.monotonic()
        if self.console.is_terminal or now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        (task,) = (task for task in self.tasks if task.id == task_id)
        if task.total is not None:
            left = (
                "" if task.time_remaining is None else f", {task.time_remaining / 60:.0f} min left"
            )
            self.console.print(
                f"{task.description}: {task.completed:.0f} of {task.total:.0f}{left}",
                highlight=False,
            )


def progress_bar(console: Console, unit: str) -> Progress:
    return LoggedProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


class StretchProgress:
    """A bar for every group of stretches, and one for the work of all of them."""

    def __init__(self, bars: Progress, stretches: Sequence[Stretch]) -> None:
        self._bars = bars
        self._behind: dict[str, int] = {}
        self._stretches = {stretch.key: stretch for stretch in stretches}
        totals: Counter[str] = Counter()
        for stretch in stretches:
            totals[stretch.bar] += stretch.last - stretch.first
        self._tasks = {name: bars.add_task(name, total=n) for name, n in totals.items()}
        self._all = bars.add_task("all of the work, %", total=100)

    def __call__(self, stretch: Stretch, step: int) -> None:
        self._behind[stretch.key] = step - stretch.first
        done = sum(n for key, n in self._behind.items() if self._stretches[key].bar == stretch.bar)
        self._bars.update(self._tasks[stretch.bar], completed=done)
        cost = sum(self._stretches[key].cost * n for key, n in self._behind.items())
        total = sum(s.cost * (s.last - s.first) for s in self._stretches.values())
        self._bars.update(self._all, completed=100 * cost / total)
