"""The study of basis convolutions, from the data to the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from growkernels.data.images import ImageData
from growkernels.data.synthetic_images import synthetic_images
from growkernels.experiments.basis import page
from growkernels.experiments.basis.claims import NAMES, basis_claims
from growkernels.experiments.basis.jobs import train_all
from growkernels.experiments.basis.plans import scaled_plan
from growkernels.experiments.basis.results import Study, metrics_records, summary_of
from growkernels.experiments.basis.search import Search, run_search
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    BY_TAYLOR,
    BY_TRAINING,
    DENSE,
    EVERYWHERE,
    FULL_FIRST,
    VARIANTS,
    BasisSettings,
)
from growkernels.experiments.basis.step_timing import StepTime, time_steps
from growkernels.experiments.basis.training import Curves, Plan, Task
from growkernels.experiments.devices import usable_device
from growkernels.experiments.image_study import (
    DATA_SEED,
    describe_images,
    progress_bar,
    read_images,
)
from growkernels.experiments.run_folder import RunFolder, refuse_occupied
from growkernels.experiments.seeds import seeded
from growkernels.experiments.statistics import Claim
from growkernels.info import environment

# Skip schedules and the variants whose first epochs they share.
BRANCHES = {BASIS_FIRST: EVERYWHERE, FULL_FIRST: DENSE}


def run_study(
    settings: BasisSettings,
    preset: str,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool,
    save_seconds: float = 10.0,
) -> Path:
    """Search, train, time and report; returns the path of ``report.html``.

    Without ``data`` the images are synthetic. ``save_seconds`` lie between checkpoints. Raises
    what ``load_images`` raises, ValueError for a device that is not there, RunFolderError for a
    folder that cannot be used. The data are read before the folder is made.
    """
    device = usable_device(device)
    refuse_occupied(out, resume)
    console = Console()
    images = _images(settings, data, console)
    config = {
        "experiment": "basis",
        "preset": preset,
        "device": device,
        "data": describe_images(images),
        "settings": asdict(settings),
    }
    folder = RunFolder(out, config, resume)
    report = out / "report.html"
    try:
        if folder.read_json("summary.json") is None or not report.exists():
            _conclude(folder, _measure(folder, settings, images, device, save_seconds, console))
            _print(folder, console)
        console.print(f"report: {report}", soft_wrap=True)
    finally:
        folder.close()
    return report


def _images(settings: BasisSettings, data: Path | None, console: Console) -> ImageData:
    if data is not None:
        return read_images(data, settings.train_images, settings.test_images, console)
    assert settings.train_images is not None
    assert settings.test_images is not None
    return synthetic_images(
        settings.train_images,
        settings.test_images,
        seeded(DATA_SEED),
        size=settings.synthetic_size,
        classes=settings.synthetic_classes,
    )


def _measure(
    folder: RunFolder,
    settings: BasisSettings,
    images: ImageData,
    device: str,
    save_seconds: float,
    console: Console,
) -> Study:
    with progress_bar(console, "trainings") as progress:
        bar = progress.add_task("search: layer times", total=None)

        def searched(done: int, total: int) -> None:
            text = "search by training" if done < total else "search by Taylor expansion"
            progress.update(bar, description=text, completed=done, total=total)

        search = run_search(settings, images, device, folder.state, searched)
    with console.status("timing training steps"):
        step_times = _step_times(folder, settings, search, len(images.classes), device)
    curves = _train(folder, settings, search, images, device, save_seconds, console)
    return Study(settings, folder.config["data"], search, curves, step_times)


def _step_times(
    folder: RunFolder, settings: BasisSettings, search: Search, classes: int, device: str
) -> dict[str, StepTime]:
    stored = folder.state.load("step-times")
    if stored is None:
        width, timing = settings.recipe.width, settings.timing
        plans: dict[str, Plan] = {DENSE: {}}
        for name, plan in search.plans.items():
            plans[name] = scaled_plan(plan, width, timing.width)
        measured = time_steps(plans, timing, settings.recipe, classes, device)
        stored = {name: asdict(value) for name, value in measured.items()}
        folder.state.save("step-times", stored)
    return {name: StepTime(**value) for name, value in stored.items()}


def _train(
    folder: RunFolder,
    settings: BasisSettings,
    search: Search,
    images: ImageData,
    device: str,
    save_seconds: float,
    console: Console,
) -> dict[str, list[Curves]]:
    chains = [
        _chain(variant, run, settings, search.plans)
        for variant in (DENSE, EVERYWHERE, BY_TRAINING, BY_TAYLOR)
        for run in range(settings.runs)
    ]
    behind = [0] * len(chains)
    with progress_bar(console, "epochs") as progress:
        total = sum(task.epochs for chain in chains for task in chain)
        bar = progress.add_task("training", total=total)

        def show(chain: int, epochs: int) -> None:
            behind[chain] = epochs
            progress.update(bar, completed=sum(behind))

        finished = train_all(chains, settings, images, folder.state, device, save_seconds, show)
    return {
        variant: [finished[_name(variant, run)] for run in range(settings.runs)]
        for variant in VARIANTS
    }


def _chain(
    variant: str, run: int, settings: BasisSettings, plans: Mapping[str, Plan]
) -> tuple[Task, ...]:
    """A variant's training and that of the skip schedule which begins with it."""
    name = _name(variant, run)
    branches = [
        Task(_name(skip, run), run, settings.epochs, plans[EVERYWHERE], skip, branch_of=name)
        for skip, origin in BRANCHES.items()
        if origin == variant
    ]
    return Task(name, run, settings.epochs, plans.get(variant, {})), *branches


def _name(variant: str, run: int) -> str:
    return f"{variant}-run{run}"


def _conclude(folder: RunFolder, study: Study) -> None:
    if folder.load_checkpoint() is None:
        for variant, runs in study.curves.items():
            for run, curves in enumerate(runs):
                for record in metrics_records(variant, run, curves):
                    folder.log(**record)
        folder.save_checkpoint({"logged": True})
    claims = basis_claims(study)
    summary: dict[str, Any] = {
        "experiment": "basis",
        "preset": folder.config["preset"],
        "data": study.data,
        "reduced": study.settings.reduced,
        "recipe": asdict(study.settings.recipe),
        "timing": asdict(study.settings.timing),
        "overview": overview(study, claims),
        **summary_of(study, study.data["classes"]),
        "claims": [claim.as_json() for claim in claims],
        "environment": environment(),
    }
    plots = page.draw_plots(study)
    for name, plot in plots.items():
        folder.write_bytes(f"plots/{name}.png", plot.png)
    folder.write_bytes("report.html", page.render(study, claims, plots, summary).encode())
    folder.write_json("summary.json", summary)


def overview(study: Study, claims: Sequence[Claim]) -> str:
    """A few sentences on what came out, for the top of the report."""
    found = []
    for variant in (EVERYWHERE, BY_TRAINING, BY_TAYLOR):
        gain, ratio = study.gain(variant, DENSE), study.time_ratio(variant)[1]
        found.append(
            f"{NAMES[variant]} {100 * (ratio - 1):+.1f} % time and {gain.mean:+.2f} ± "
            f"{gain.sem:.2f} points of accuracy"
        )
    counts = Counter(claim.verdict for claim in claims)
    where = " (at reduced sizes, see below)" if study.settings.reduced else ""
    return (
        f"On {study.data['name']}, against dense: {'; '.join(found)}. Of {len(claims)} claims "
        f"{counts['holds']} hold, {counts['does not hold']} do not hold, and "
        f"{counts['cannot be told']} cannot be told from these runs{where}."
    )


def _print(folder: RunFolder, console: Console) -> None:
    summary = folder.read_json("summary.json")
    assert summary is not None
    console.print(summary["overview"])
    for claim in summary["claims"]:
        console.print(f"  {claim['verdict']:15} {claim['claim']}", highlight=False)
