"""SensLI: insert the layer whose virtual parameters have the largest gradient (2311.15995)."""

from growkernels.growth.layer_insertion.block_copies import config_before
from growkernels.growth.layer_insertion.driver import LayerInsertion
from growkernels.growth.layer_insertion.merit_norms import NORMS
from growkernels.growth.layer_insertion.merits import Merits
from growkernels.growth.layer_insertion.positions import Position, find_positions
from growkernels.growth.layer_insertion.triggers import (
    FixedStep,
    Interval,
    LossPlateau,
    MeritRatio,
    Trigger,
)

__all__ = [
    "NORMS",
    "FixedStep",
    "Interval",
    "LayerInsertion",
    "LossPlateau",
    "MeritRatio",
    "Merits",
    "Position",
    "Trigger",
    "config_before",
    "find_positions",
]
