"""The `growkernels` command, with a very small study behind `reproduce sensli`.

short_study.py reproduce sensli --out FOLDER [--resume]
"""

import sys

import tiny_spirals_study

from growkernels import cli
from growkernels.experiments import sensli
from growkernels.experiments.sensli.spirals_study import run_spirals

EPOCHS = 10


def run(preset, net, data, device, out, resume, optimizer):
    settings = tuple(tiny_spirals_study.settings(EPOCHS))
    return run_spirals(preset, device, out, resume, settings, save_seconds=0.0)


if __name__ == "__main__":
    sensli.run = run
    sys.exit(cli.main())
