import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from growkernels.experiments import progress


@pytest.mark.parametrize(
    ("terminal", "lines"), [(False, ["training: 3 of 9", "training: 7 of 9"]), (True, [])]
)
def test_a_log_gets_a_line_a_minute(monkeypatch, terminal, lines):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    written = io.StringIO()
    bars = progress.LoggedProgress(
        console=Console(file=written, force_terminal=terminal, width=80), auto_refresh=False
    )
    task = bars.add_task("training", total=9)
    for clock.now, completed in ((59.0, 2), (60.0, 3), (100.0, 5), (125.0, 7)):
        bars.update(task, completed=completed)
    told = [line.partition(",")[0] for line in written.getvalue().splitlines()]
    assert told == lines
