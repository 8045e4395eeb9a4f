"""The reproduction of SensLI, sensitivity-based layer insertion (arXiv 2311.15995)."""

from __future__ import annotations

from pathlib import Path

NETS = ("fc", "cnn")
OPTIMIZERS = ("plain", "momentum")

__all__ = ["NETS", "OPTIMIZERS", "run"]


def run(
    preset: str,
    net: str,
    data: Path | None,
    device: str,
    out: Path,
    resume: bool = False,
    optimizer: str = "plain",
) -> Path:
    """Train, compare and report; returns the path of ``report.html`` in ``out``.

    ``net`` "fc" is the study of fully connected networks (feed-forward and residual) on the
    spirals, small enough for the paper's size in every preset: they differ in the number of runs;
    "cnn" that of convolutional networks on the images in ``data``, where ``optimizer`` "plain" is
    the SGD that the authors' code runs and "momentum" the one that it names.
    Raises ValueError for an unknown choice and RunFolderError for a folder that cannot be used.
    """
    from growkernels.experiments.reproduce import PRESETS, check_choice
    from growkernels.experiments.sensli.cnn_study import run_cnn
    from growkernels.experiments.sensli.spirals_study import run_spirals

    check_choice("preset", preset, PRESETS)
    check_choice("net", net, NETS)
    check_choice("optimizer", optimizer, OPTIMIZERS)
    if net == "cnn":
        if data is None:
            raise ValueError(
                "--net cnn needs images: give --data DIR with CIFAR-10, its unpacked archive or a "
                "tree train/<class>/*.jpg and test/<class>/*.jpg (the spirals of --net fc need "
                "none)."
            )
        return run_cnn(preset, optimizer, data, device, out, resume)
    if optimizer != "plain":
        raise ValueError("--optimizer is for --net cnn; the spirals train with plain SGD alone.")
    if data is not None:
        raise ValueError("--data is given, but the spirals are generated; leave it out.")
    return run_spirals(preset, device, out, resume)
