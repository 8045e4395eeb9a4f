"""`growkernels reproduce sensli`, of a very small study; where it helps, it kills itself once.

helped_study.py reproduce sensli --out FOLDER
"""

import os
import signal
import sys
from pathlib import Path

import tiny_spirals_study

from growkernels import cli
from growkernels.experiments import runner, sensli
from growkernels.experiments.sensli.spirals_study import run_spirals

EPOCHS = 10


def run(preset, net, data, device, out, resume, optimizer):
    settings = tuple(tiny_spirals_study.settings(EPOCHS))
    return run_spirals(preset, device, out, resume, settings, save_seconds=0.0)


def noting(job, report):
    """In a helper: say which stretch it has trained, or die in the third of the first start."""
    notes = Path(os.environ["NOTES"])
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]
    if start == "0" and len(list(notes.glob("0-*"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    train_stretch(job, report)
    (notes / f"{start}-{job.stretch.key}").touch()


if __name__ == "__main__":
    train_stretch = runner.train_stretch
    sensli.run = run
    if os.environ["RANK"] != "0":
        runner.train_stretch = noting  # which a helper finds by its name
    sys.exit(cli.main())
