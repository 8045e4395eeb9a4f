"""The study of non-uniform scaling, from the data to the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from growkernels.data.images import ImageData, load_images, stored_size
from growkernels.data.synthetic_images import synthetic_images
from growkernels.experiments.devices import usable_device
from growkernels.experiments.image_study import DATA_SEED, describe_images, progress_bar
from growkernels.experiments.run_folder import RunFolder, refuse_occupied
from growkernels.experiments.scaling import page
from growkernels.experiments.scaling.claims import all_claims, overview
from growkernels.experiments.scaling.history import History
from growkernels.experiments.scaling.image_cache import store_images, stored_images
from growkernels.experiments.scaling.results import Results, metrics_records, variant_summary
from growkernels.experiments.scaling.settings import (
    DATA,
    SYNTHETIC_CLASSES,
    DataLimits,
    Preset,
    Setting,
    Variant,
    preset_setting,
    reduced,
)
from growkernels.experiments.scaling.training import train_all
from growkernels.experiments.seeds import seeded
from growkernels.info import environment


def run_study(
    preset: Preset,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool,
    setting: Setting | None = None,
    limits: DataLimits | None = None,
    save_seconds: float = 20.0,
) -> Path:
    """Trains all variants and returns the path of ``report.html``.

    ``data`` None: generated images, in preset quick alone. ``setting`` and ``limits`` replace what
    the preset stands for (tests), ``save_seconds`` lie between checkpoints.
    Raises what ``load_images`` raises, ValueError for a choice that cannot be, RunFolderError for a
    folder that cannot be used. The images are read before the folder is made.
    """
    device = usable_device(device)
    limits = limits or DATA[preset]
    refuse_occupied(out, resume)
    console = Console()
    cache = out / "state" / "images.pt"
    _provide_images(cache, data, limits, console)
    images = stored_images(cache)
    setting = setting or preset_setting(preset, images.train_images.shape[-1])
    config = {
        "experiment": "scaling",
        "preset": preset,
        "device": device,
        "data": describe_images(images),
        "setting": asdict(setting),
    }
    folder = RunFolder(out, config, resume)
    report = out / "report.html"
    try:
        if folder.read_json("summary.json") is None or not report.exists():
            results = _train(folder, setting, cache, device, save_seconds, console)
            _conclude(folder, setting, results, console)
        cache.unlink()
        console.print(f"report: {report}", soft_wrap=True)
    finally:
        folder.close()
    return report


def _provide_images(cache: Path, data: Path | None, limits: DataLimits, console: Console) -> None:
    """Make sure that the run's images lie in ``cache``, as squares of one size."""
    if data is None:
        store_images(
            cache,
            {"data": "synthetic", **asdict(limits)},
            lambda: synthetic_images(
                limits.train or 0,
                limits.test or 0,
                seeded(DATA_SEED),
                classes=SYNTHETIC_CLASSES,
            ),
        )
        return
    height, width = stored_size(data)
    square = None if height == width <= limits.small else limits.square

    def read() -> ImageData:
        with progress_bar(console, "images") as progress:
            task = progress.add_task("reading images", total=None)
            return load_images(
                data,
                seeded(DATA_SEED),
                train_limit=limits.train,
                test_limit=limits.test,
                class_limit=limits.classes,
                square=square,
                progress=lambda done, total: progress.update(task, completed=done, total=total),
            )

    store_images(cache, {"data": str(data.resolve()), **asdict(limits)}, read)


def _train(
    folder: RunFolder,
    setting: Setting,
    images: Path,
    device: str,
    save_seconds: float,
    console: Console,
) -> dict[str, list[History]]:
    logged: list[str] = (folder.load_checkpoint() or {"logged": []})["logged"]
    behind: Counter[tuple[str, int]] = Counter()
    with progress_bar(console, "epochs") as progress:
        total = setting.runs * setting.epochs
        tasks = {v.name: progress.add_task(f"{v.name:17}", total=total) for v in setting.variants}

        def show(variant: Variant, run: int, epochs: int) -> None:
            behind[variant.name, run] = epochs
            done = sum(behind[variant.name, other] for other in range(setting.runs))
            progress.update(tasks[variant.name], completed=done)

        def finished(variant: Variant, run: int, history: History) -> None:
            key = f"{variant.name}-run{run}"
            if key not in logged:
                for record in metrics_records(variant, run, history):
                    folder.log(**record)
                logged.append(key)
                folder.save_checkpoint({"logged": logged})

        return train_all(setting, images, folder.state, device, save_seconds, show, finished)


def _conclude(folder: RunFolder, setting: Setting, results: Results, console: Console) -> None:
    claims = all_claims(setting, results)
    with console.status("drawing the plots"):
        plots = page.draw_plots(setting, results)
    data: Mapping[str, Any] = folder.config["data"]
    summary: dict[str, Any] = {
        "experiment": "scaling",
        "preset": folder.config["preset"],
        "data": data,
        "reduced": reduced(folder.config["preset"], setting, data["train_images"], data["classes"]),
        "overview": overview(claims, results),
        "variants": {name: variant_summary(runs) for name, runs in results.items()},
        "claims": [claim.as_json() for claim in claims],
        "environment": environment(),
    }
    for name, plot in plots.items():
        folder.write_bytes(f"plots/{name}.png", plot.png)
    folder.write_bytes(
        "report.html", page.render(setting, results, claims, plots, summary).encode()
    )
    folder.write_json("summary.json", summary)
    console.print(summary["overview"])
    for claim in claims:
        console.print(f"  {claim.verdict:15} {claim.statement}", highlight=False)
