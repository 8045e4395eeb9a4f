"""The command that runs a study on images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from growkernels.experiments.devices import usable_device
from growkernels.experiments.images.store import ImageSource, Selection, provide_images
from growkernels.experiments.progress import progress_bar
from growkernels.experiments.reproduce import SAVE_SECONDS, reproduce
from growkernels.experiments.run_folder import refuse_occupied
from growkernels.experiments.study import Content


def reproduce_on_images(
    build: Callable[[ImageSource], Content],
    preset: str,
    folder: Path | None,
    selection: Selection,
    device: str,
    out: Path,
    resume: bool,
    save_seconds: float = SAVE_SECONDS,
) -> Path:
    """Reads the images, builds the study for them and runs it; the path of ``report.html``.

    Raises what ``load_images`` raises, ValueError for a device that is not there, RunFolderError
    for a folder that cannot be used. The images are read before the folder is made.
    """
    device = usable_device(device)
    refuse_occupied(out, resume)
    console = Console()
    path = out / "state" / "images.pt"
    with progress_bar(console, "images") as bars:
        bar = bars.add_task("reading images", total=None)
        about = provide_images(
            path,
            folder,
            selection,
            lambda done, total: bars.update(bar, completed=done, total=total),
        )
    content = build(ImageSource(path, about, device))
    report = reproduce(content, preset, out, resume, console, save_seconds)
    path.unlink()
    return report
