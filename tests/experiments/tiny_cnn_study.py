"""A very small CNN study as a program, for the tests that kill and resume it.

python tiny_cnn_study.py DATA FOLDER [--resume]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from growkernels.experiments.sensli.cnn_settings import (
    Attempt,
    CnnOptimizer,
    CnnPreset,
    Sizes,
    cnn_settings,
)
from growkernels.experiments.sensli.cnn_study import run_cnn

PLAIN = CnnOptimizer("plain", 0.05)


def preset(optimizer: CnnOptimizer = PLAIN) -> CnnPreset:
    sizes = Sizes(
        optimizer=optimizer, growing=(3, 4, 5), equal=(4, 4, 4), batch=8, head_width=6, block=2,
        attempt_block=2,
        sweep=(1, 3), sweep_epochs=4, runs=2, single_runs=2,
    )  # fmt: skip
    *others, three = cnn_settings(sizes)
    # Networks as small as these decline: let them insert, so that there is a final architecture.
    attempts = tuple(Attempt(attempt.epoch, "max") for attempt in three.variants[0].attempts)
    forced = replace(three.variants[0], attempts=attempts)
    return CnnPreset((*others, replace(three, variants=(forced, *three.variants[1:]))), 36, 12)


def run(data: Path, out: Path, resume: bool) -> Path:
    return run_cnn("quick", "plain", data, "cpu", out, resume, preset(), save_seconds=0.0)


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), "--resume" in sys.argv)
