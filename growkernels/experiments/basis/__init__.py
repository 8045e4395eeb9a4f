"""The reproduction of the basis-convolution search for ResNet-18 (arXiv 2408.06024)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

__all__ = ["run"]


def run(
    preset: str,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool = False,
    autocast: bool = False,
    runs: int | None = None,
) -> Path:
    """Search, train, compare and report; returns the path of ``report.html`` in ``out``.

    ``data`` is a folder that ``load_images`` understands; without one the quick preset generates
    images, which it calls synthetic everywhere. ``autocast`` trains in bfloat16 where torch holds
    that to be safe. ``runs`` of every variant replace the preset's number; a finished run is
    resumed with more of them.
    Raises ValueError for an unknown choice, what ``load_images`` raises, and RunFolderError for a
    folder that cannot be used.
    """
    from growkernels.experiments.basis.settings import preset_settings
    from growkernels.experiments.basis.study import run_study
    from growkernels.experiments.reproduce import PRESETS, check_choice, check_images

    check_choice("preset", preset, PRESETS)
    check_images(preset, data)
    settings = preset_settings(preset, synthetic=data is None, autocast=autocast)
    settings = replace(settings, runs=runs or settings.runs)
    return run_study(settings, preset, data, device, out, resume)
