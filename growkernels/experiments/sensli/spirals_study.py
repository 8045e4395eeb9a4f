"""The study of fully connected networks on the spirals, from training to the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from growkernels.experiments.devices import usable_device
from growkernels.experiments.progress import LoggedProgress
from growkernels.experiments.run_folder import RunFolder
from growkernels.experiments.sensli import merit_timing
from growkernels.experiments.sensli.claims import all_claims, overview
from growkernels.experiments.sensli.engine import SettingRun
from growkernels.experiments.sensli.results import metrics_records, setting_summary
from growkernels.experiments.sensli.settings import SETTINGS, Setting
from growkernels.experiments.sensli.spirals_report import draw_plots, write_report
from growkernels.experiments.sensli.training import train_all
from growkernels.info import environment

METRICS_EVERY = 25  # epochs


def run_spirals(
    preset: str,
    device: str,
    out: Path,
    resume: bool,
    settings: Sequence[Setting] = SETTINGS,
    save_seconds: float = 5.0,
) -> Path:
    """Runs ``settings`` and returns the report's path; ``save_seconds`` between checkpoints."""
    config = {
        "experiment": "sensli",
        "net": "fc",
        "preset": preset,
        "device": usable_device(device),
        "settings": [asdict(setting) for setting in settings],
    }
    folder = RunFolder(out, config, resume)
    report = out / "report.html"
    console = Console()
    try:
        if folder.read_json("summary.json") is None or not report.exists():
            runs = _train(folder, settings, device, save_seconds, console)
            _conclude(folder, runs, device, console)
        console.print(f"report: {report}", soft_wrap=True)
    finally:
        folder.close()
    return report


def _train(
    folder: RunFolder,
    settings: Sequence[Setting],
    device: str,
    save_seconds: float,
    console: Console,
) -> list[SettingRun]:
    logged: list[str] = (folder.load_checkpoint() or {"logged": []})["logged"]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("epoch {task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
    )
    with LoggedProgress(*columns, console=console) as progress:
        tasks = {
            s.name: progress.add_task(f"{s.name:6} {s.family}", total=s.epochs) for s in settings
        }

        def show(setting: Setting, epoch: int) -> None:
            progress.update(tasks[setting.name], completed=min(epoch, setting.epochs))

        def finished(run: SettingRun) -> None:
            name = run.setting.name
            if name not in logged:
                for record in metrics_records(run, METRICS_EVERY):
                    folder.log(**record)
                logged.append(name)
                folder.save_checkpoint({"logged": logged})

        return train_all(settings, folder.state, device, save_seconds, show, finished)


def _conclude(folder: RunFolder, runs: Sequence[SettingRun], device: str, console: Console) -> None:
    claims = all_claims(runs)
    with console.status("timing the merit pass, drawing the plots"):
        timing = {
            run.setting.name: merit_timing.measure(run.setting, device)
            for run in runs
            if run.setting.role == "one or three insertions"
        }
        plots = draw_plots(runs)
    summary: dict[str, Any] = {
        "experiment": "sensli",
        "net": "fc",
        "preset": folder.config["preset"],
        "overview": overview(claims, runs),
        "settings": {run.setting.name: setting_summary(run) for run in runs},
        "training_seconds": {run.setting.name: round(run.seconds.sum().item(), 2) for run in runs},
        "merit_pass_milliseconds": timing,
        "claims": [claim.as_json() for claim in claims],
        "environment": environment(),
    }
    for name, plot in plots.items():
        folder.write_bytes(f"plots/{name}.png", plot.png)
    write_report(folder, runs, claims, plots, summary)
    folder.write_json("summary.json", summary)
    console.print(summary["overview"])
    for claim in claims:
        console.print(f"  {claim.verdict:15} {claim.statement}", highlight=False)
