"""The reproduction of Beyond Uniform Scaling (arXiv 2402.12418)."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from growkernels.experiments.scaling.settings import Preset
from growkernels.experiments.scaling.study import run_study

__all__ = ["run"]


def run(preset: str, data: Path | None, device: str, out: Path, resume: bool = False) -> Path:
    """Train, compare and report; returns the path of ``report.html`` in ``out``.

    ``data`` is a folder of images; without one, preset quick trains on generated images.
    Raises ValueError for an unknown preset or for preset paper without data, and what
    ``run_study`` raises.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"--preset is {preset!r}; choose one of {', '.join(get_args(Preset))}.")
    if preset == "paper" and data is None:
        raise ValueError(
            "--preset paper needs images: give --data DIR with a tree train/<class>/*.jpg and "
            "val/<class>/*.jpg (ImageNet-100, Tiny ImageNet) or CIFAR-10; --preset quick generates "
            "its own."
        )
    return run_study("paper" if preset == "paper" else "quick", data, device, out, resume)
