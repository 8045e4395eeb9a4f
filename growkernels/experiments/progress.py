"""Progress bars that also tell something where there is no terminal to draw them on."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import Progress, TaskID

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
            self.console.print(
                f"{task.description}: {task.completed:.0f} of {task.total:.0f}", highlight=False
            )
