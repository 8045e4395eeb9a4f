"""The reproduction of SensLI, sensitivity-based layer insertion (arXiv 2311.15995)."""

from __future__ import annotations

from pathlib import Path

from growkernels.experiments.sensli.spirals_study import run_spirals

PRESETS = ("quick", "paper")
NETS = ("fc",)

__all__ = ["NETS", "PRESETS", "run"]


def run(
    preset: str, net: str, data: Path | None, device: str, out: Path, resume: bool = False
) -> Path:
    """Train, compare and report; returns the path of ``report.html`` in ``out``.

    ``net`` "fc" is the study of fully connected networks (feed-forward and residual) on the
    spirals, which is small enough to run at the paper's size in both presets.
    Raises ValueError for an unknown choice and RunFolderError for a folder that cannot be used.
    """
    for name, value, choices in (("preset", preset, PRESETS), ("net", net, NETS)):
        if value not in choices:
            raise ValueError(f"--{name} is {value!r}; choose one of {', '.join(choices)}.")
    if data is not None:
        raise ValueError("--data is given, but the spirals are generated; leave it out.")
    return run_spirals(preset=preset, device=device, out=out, resume=resume)
