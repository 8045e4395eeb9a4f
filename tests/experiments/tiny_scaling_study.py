"""A very small study of non-uniform scaling as a program, for the tests that kill and resume it.

python tiny_scaling_study.py FOLDER [--resume]
"""

from __future__ import annotations

import sys
from pathlib import Path

from growkernels.experiments.images.store import Selection
from growkernels.experiments.scaling.settings import (
    Architecture,
    Recipe,
    Setting,
    variants,
)
from growkernels.experiments.scaling.study import run_study

SELECTION = Selection(40, 20, 10, 64, 64)


def setting(**recipe: float) -> Setting:
    options = {
        "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "rand_augment": False,
        "resized_crops": False, "repeats": 1, "epoch_images": 16, **recipe,
    }  # fmt: skip
    return Setting(
        architecture=Architecture(embed=16, depth=1, heads=2, patch=16, image_size=32),
        recipe=Recipe(batch=8, rate=5e-3, warmup_epochs=1, **options),
        variants=variants((1, 4, 2, 3)),
        epochs=3,
        first_growth=1,
        growth_batches=2,
        growth_rows=200,
        eligible=2,
        runs=2,
        test_every=2,
    )


def run(out: Path, resume: bool) -> Path:
    return run_study("quick", None, "cpu", out, resume, setting(), SELECTION, save_seconds=0.0)


if __name__ == "__main__":
    run(Path(sys.argv[1]), "--resume" in sys.argv)
