"""The reproduction of the basis-convolution search for ResNet-18 (arXiv 2408.06024)."""

from __future__ import annotations

from pathlib import Path

from growkernels.experiments.basis.settings import PRESETS, preset_settings
from growkernels.experiments.basis.study import run_study

__all__ = ["PRESETS", "run"]


def run(
    preset: str,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool = False,
    autocast: bool = False,
) -> Path:
    """Search, train, compare and report; returns the path of ``report.html`` in ``out``.

    ``data`` is a folder that ``growkernels.data.images.load_images`` understands; without one the
    quick preset generates images, which it calls synthetic everywhere. ``autocast`` trains in
    bfloat16 where torch holds that to be safe.
    Raises ValueError for an unknown choice, what ``load_images`` raises, and RunFolderError for a
    folder that cannot be used.
    """
    if preset not in PRESETS:
        raise ValueError(f"--preset is {preset!r}; choose one of {', '.join(PRESETS)}.")
    if preset == "paper" and data is None:
        raise ValueError(
            "--preset paper needs images: give --data DIR with CIFAR-10, its unpacked archive or a "
            "tree train/<class>/*.jpg and test/<class>/*.jpg (the quick preset can do without)."
        )
    settings = preset_settings(preset, synthetic=data is None, autocast=autocast)
    return run_study(settings, preset, data, device, out, resume)
