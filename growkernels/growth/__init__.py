"""Drivers that let networks grow while they train."""

from growkernels.growth.grown import insertions, rebuild
from growkernels.growth.layer_insertion import LayerInsertion
from growkernels.growth.merits import Merits
from growkernels.growth.neuron_scaling import NeuronScaling
from growkernels.growth.positions import Position, find_positions
from growkernels.growth.triggers import FixedStep, Interval, LossPlateau, MeritRatio, Trigger

__all__ = [
    "FixedStep",
    "Interval",
    "LayerInsertion",
    "LossPlateau",
    "MeritRatio",
    "Merits",
    "NeuronScaling",
    "Position",
    "Trigger",
    "find_positions",
    "insertions",
    "rebuild",
]
