"""Runs a study from its data to its report, into a run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from growkernels.experiments import report, team
from growkernels.experiments.claims import judge, registered, registration, tally
from growkernels.experiments.progress import StretchProgress, progress_bar
from growkernels.experiments.run_folder import RunFolder, RunFolderError
from growkernels.experiments.runner import train
from growkernels.experiments.study import Content, Result
from growkernels.experiments.time_limit import TimeLimitError
from growkernels.info import environment

SAVE_SECONDS = 15.0
PRESETS = ("quick", "desk", "paper")
QUICK = (
    "This is the quick preset, a tour: it gives curves, and few verdicts, because one on accuracy "
    "or loss needs 6 runs of networks that have learned something. "
)


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError with one sentence for a choice that there is not."""
    if value not in choices:
        raise ValueError(f"--{option} is {value!r}; choose one of {', '.join(choices)}.")


def check_images(preset: str, folder: Path | None) -> None:
    """Raises ValueError where a preset that cannot do without images has none."""
    if folder is None and preset != "quick":
        raise ValueError(
            f"--preset {preset} needs images: give --data DIR with CIFAR-10, its unpacked archive "
            "or a tree train/<class>/*.jpg and test/<class>/*.jpg (or val/<class>/); the quick "
            "preset generates its own."
        )


def reproduce(
    content: Content,
    preset: str,
    out: Path,
    resume: bool,
    console: Console,
    save_seconds: float = SAVE_SECONDS,
) -> Path:
    """Trains, judges and reports; returns the path of ``report.html`` in ``out``.

    ``save_seconds`` lie between checkpoints. Raises RunFolderError for a folder that cannot be
    used, and TimeLimitError at a limit of time, after everything is on disk.
    """
    config: dict[str, Any] = {
        "experiment": content.name,
        "preset": preset,
        "device": content.device,
    }
    if team.processes() > 1:
        config["processes"] = team.processes()  # that share each batch
    folder = RunFolder(out, config | content.config(), resume)
    page = out / "report.html"
    try:
        done = folder.read_json("summary.json")
        if done is None or done.get("runs") != content.run_count or not page.exists():
            _run(content, folder, save_seconds, console, _earlier(done, content.run_count, out))
        console.print(f"report: {page}", soft_wrap=True)
    finally:
        folder.close()
    return page


def _earlier(done: dict[str, Any] | None, runs: int | None, folder: Path) -> list[dict[str, Any]]:
    """Where and with how many runs the study was finished before more were asked for."""
    if done is None:
        return []
    before = done.get("runs")
    if before is None or runs is None or before == runs:
        return list(done.get("earlier", ()))
    if runs < before:
        raise RunFolderError(
            f"{folder} holds {before} runs of every variant, and --runs asks for {runs}; give "
            f"--runs {before} or more, or --out another folder."
        )
    return [*done["earlier"], {key: done[key] for key in ("runs", "environment")}]


def _run(
    content: Content,
    folder: RunFolder,
    save_seconds: float,
    console: Console,
    earlier: list[dict[str, Any]],
) -> None:
    content = content.prepare(folder, console)
    results: dict[str, Result] = {}
    try:
        with progress_bar(console, "epochs") as bars:
            show = StretchProgress(bars, content.stretches())
            train(content, folder.state, save_seconds, show, results)
    except TimeLimitError:
        folder.write_metrics(content.records(results))
        raise
    folder.write_metrics(content.records(results))
    with console.status("judging and drawing"):
        found = content.conclude(results, folder)
        claims = judge(registered(content.claims), found.evidence)
    preset = folder.config["preset"]
    tour = QUICK if preset == "quick" else ""
    summary: dict[str, Any] = {
        **{key: folder.config[key] for key in ("experiment", "net", "preset", "data")
           if key in folder.config},
        "overview": f"{tour}{found.overview} {tally(claims)}",
        "runs": content.run_count,
        "earlier": earlier,
        **found.summary,
        "claims": [claim.as_json() for claim in claims],
        "registration": registration(content.claims),
        "environment": environment(),
    }  # fmt: skip
    for name, plot in found.plots.items():
        folder.write_bytes(f"plots/{name}.png", plot.png)
    text = report.render(content.page, summary, found.plots, found.shown)
    folder.write_bytes("report.html", text.encode())
    folder.write_json("summary.json", summary)
    console.print(summary["overview"])
    for claim in claims:
        console.print(f"  {claim.verdict:15} {claim.statement}", highlight=False)
