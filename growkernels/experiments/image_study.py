"""What studies on images share: reading the data with progress, and telling what they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from growkernels.data.images import ImageData, load_images
from growkernels.experiments.progress import LoggedProgress
from growkernels.experiments.seeds import seeded

DATA_SEED = 1

LOSSY_IMAGES = (
    "The images come from JPEG files, a lossy format, so accuracies are not exactly comparable "
    "with those on the original data."
)


def progress_bar(console: Console, unit: str) -> Progress:
    return LoggedProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
    )


def read_images(
    folder: Path, train_limit: int | None, test_limit: int | None, console: Console
) -> ImageData:
    """``load_images`` with a fixed seed and a progress bar; raises what it raises."""
    with progress_bar(console, "images") as progress:
        task = progress.add_task("reading images", total=None)
        return load_images(
            folder,
            seeded(DATA_SEED),
            train_limit=train_limit,
            test_limit=test_limit,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def describe_images(images: ImageData) -> dict[str, Any]:
    """What a report and a configuration say about the data; the sum tells data sets apart."""
    return {
        "name": images.name,
        "classes": len(images.classes),
        "train_images": len(images.train_images),
        "test_images": len(images.test_images),
        "size": "x".join(map(str, images.train_images.shape[2:])),
        "sum": int(images.train_images.sum()) + int(images.test_images.sum()),
    }


def is_lossy(data: Mapping[str, Any]) -> bool:
    """Whether images described by `describe_images` were read from a lossy format."""
    return "JPEG" in data["name"]
