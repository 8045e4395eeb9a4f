"""The study of convolutional networks on images, from the data to the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console

from growkernels.data.images import ImageData
from growkernels.experiments.devices import usable_device
from growkernels.experiments.image_study import describe_images, progress_bar, read_images
from growkernels.experiments.run_folder import RunFolder, number, refuse_occupied
from growkernels.experiments.sensli import cnn_report
from growkernels.experiments.sensli.cnn_claims import cnn_claims
from growkernels.experiments.sensli.cnn_engine import CnnRun
from growkernels.experiments.sensli.cnn_results import (
    final,
    metrics_records,
    setting_summary,
)
from growkernels.experiments.sensli.cnn_settings import CnnPreset, CnnSetting, Preset, cnn_preset
from growkernels.experiments.sensli.cnn_training import train_all
from growkernels.experiments.statistics import Claim, estimate
from growkernels.info import environment

TIMED = ("cnn_exp5", "cnn_exp9")  # one setting per base network


def run_cnn(
    preset: str,
    optimizer: str,
    data: Path,
    device: str,
    out: Path,
    resume: bool,
    sizes: CnnPreset | None = None,
    save_seconds: float = 10.0,
) -> Path:
    """Runs the four CNN settings on the images in ``data``; returns the path of ``report.html``.

    ``sizes`` replaces what the preset stands for (tests), ``save_seconds`` lie between checkpoints.
    Raises what ``load_images`` raises, ValueError for an unknown choice, RunFolderError for a
    folder that cannot be used. The data are read before the folder is made.
    """
    sizes = sizes or cnn_preset(
        cast(Preset, preset), cast("Literal['plain', 'momentum']", optimizer)
    )
    device = usable_device(device)
    refuse_occupied(out, resume)
    console = Console()
    images = read_images(data, sizes.train_limit, sizes.test_limit, console)
    config = {
        "experiment": "sensli",
        "net": "cnn",
        "preset": preset,
        "device": device,
        "data": describe_images(images),
        "settings": [asdict(setting) for setting in sizes.settings],
    }
    folder = RunFolder(out, config, resume)
    report = out / "report.html"
    try:
        if folder.read_json("summary.json") is None or not report.exists():
            runs = _train(folder, sizes.settings, images, device, save_seconds, console)
            _conclude(folder, runs, sizes, console)
        console.print(f"report: {report}", soft_wrap=True)
    finally:
        folder.close()
    return report


def _train(
    folder: RunFolder,
    settings: Sequence[CnnSetting],
    images: ImageData,
    device: str,
    save_seconds: float,
    console: Console,
) -> dict[str, list[CnnRun]]:
    logged: list[str] = (folder.load_checkpoint() or {"logged": []})["logged"]
    behind: Counter[tuple[str, int]] = Counter()
    with progress_bar(console, "epochs") as progress:
        tasks = {
            s.name: progress.add_task(f"{s.name:9} {s.role}", total=s.runs * s.epochs_to_train)
            for s in settings
        }

        def show(setting: CnnSetting, run: int, epochs: int) -> None:
            behind[setting.name, run] = min(epochs, setting.epochs_to_train)
            done = sum(behind[setting.name, other] for other in range(setting.runs))
            progress.update(tasks[setting.name], completed=done)

        def finished(run: CnnRun) -> None:
            key = f"{run.setting.name}-run{run.run}"
            if key not in logged:
                for record in metrics_records(run):
                    folder.log(**record)
                logged.append(key)
                folder.save_checkpoint({"logged": logged})

        return train_all(settings, images, folder.state, device, save_seconds, show, finished)


def _conclude(
    folder: RunFolder,
    runs: Mapping[str, Sequence[CnnRun]],
    sizes: CnnPreset,
    console: Console,
) -> None:
    claims = cnn_claims(runs)
    with console.status("timing the merit pass, drawing the plots"):
        times = {name: runs[name][0].time_merit_passes() for name in TIMED}
        plots = cnn_report.draw_plots(runs)
    summary: dict[str, Any] = {
        "experiment": "sensli",
        "net": "cnn",
        "preset": folder.config["preset"],
        "data": folder.config["data"],
        "optimizer": asdict(sizes.settings[0].optimizer),
        "reduced": sizes.reduced,
        "overview": _overview(claims, runs, sizes),
        "settings": {name: setting_summary(setting_runs) for name, setting_runs in runs.items()},
        "merit_pass_milliseconds_per_batch": {
            name: {key: number(value) for key, value in asdict(time).items()}
            for name, time in times.items()
        },
        "claims": [claim.as_json() for claim in claims],
        "environment": environment(),
    }
    for name, plot in plots.items():
        folder.write_bytes(f"plots/{name}.png", plot.png)
    folder.write_bytes("report.html", cnn_report.render(runs, claims, plots, summary).encode())
    folder.write_json("summary.json", summary)
    console.print(summary["overview"])
    for claim in claims:
        console.print(f"  {claim.verdict:15} {claim.statement}", highlight=False)


def _overview(
    claims: Sequence[Claim], runs: Mapping[str, Sequence[CnnRun]], sizes: CnnPreset
) -> str:
    """A few sentences on what came out, for the top of the report."""
    counts = Counter(claim.verdict for claim in claims)
    summary = setting_summary(runs["cnn_exp5"])
    losses = {name: value["loss_mean"] for name, value in summary.items()}
    gap = estimate(final(runs["cnn_exp5"], "max") - final(runs["cnn_exp5"], "small"))
    return (
        f"On {runs['cnn_exp5'][0].data.name}, one inserted convolution changed the final training "
        f"loss by {gap.mean:+.3f} ± {gap.sem:.3f} against the small net (cnn_exp5: "
        f"{', '.join(f'{name} {loss:.3f}' for name, loss in losses.items() if loss is not None)}). "
        f"Of the paper's {len(claims)} claims on CNNs, {counts['holds']} hold, "
        f"{counts['does not hold']} do not hold, and {counts['cannot be told']} cannot be told "
        f"from these runs{' (at reduced sizes, see below)' if sizes.reduced else ''}."
    )
