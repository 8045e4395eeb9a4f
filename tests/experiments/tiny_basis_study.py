"""A very small study of basis convolutions as a program, for the tests that kill and resume it.

python tiny_basis_study.py FOLDER [--resume]
"""

from __future__ import annotations

import sys
from pathlib import Path

from growkernels.experiments.basis.settings import BasisSettings, Recipe, StepTiming
from growkernels.experiments.basis.study import run_study


def settings() -> BasisSettings:
    # Width 8: at 4, oneDNN for AVX2 writes past its buffer in torch's weight gradient of the
    # strided 1x1 convolution (torch 2.13, one thread, channels_last).
    return BasisSettings(
        Recipe(8, 8, 0.05, 0.9, 5e-4, crop_padding=1),
        StepTiming(width=8, batch=2, image_size=8, rounds=2, layer_rounds=1),
        epochs=2, runs=2, search_epochs=1, search_runs=1, validation_images=8,
        calibration_images=16, train_images=24, test_images=20, synthetic_size=16,
        fractions=(0.25, 0.5),
    )  # fmt: skip


def run(out: Path, resume: bool) -> Path:
    return run_study(settings(), "quick", None, "cpu", out, resume, save_seconds=0.0)


if __name__ == "__main__":
    run(Path(sys.argv[1]), "--resume" in sys.argv)
