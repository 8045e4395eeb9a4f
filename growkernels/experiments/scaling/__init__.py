"""The reproduction of Beyond Uniform Scaling (arXiv 2402.12418)."""

from __future__ import annotations

from pathlib import Path

__all__ = ["run"]


def run(
    preset: str,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool = False,
    runs: int | None = None,
) -> Path:
    """Train, compare and report; returns the path of ``report.html`` in ``out``.

    ``data`` is a folder of images; without one, preset quick trains on generated images.
    ``runs`` of every variant replace the preset's number; a finished run is resumed with more.
    Raises ValueError for an unknown preset or for one that needs data without, and what
    ``run_study`` raises.
    """
    from growkernels.experiments.reproduce import PRESETS, check_choice, check_images
    from growkernels.experiments.scaling.study import run_study

    check_choice("preset", preset, PRESETS)
    check_images(preset, data)
    return run_study(preset, data, device, out, resume, runs=runs)
