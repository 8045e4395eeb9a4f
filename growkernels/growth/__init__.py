"""Drivers that let networks grow while they train."""

from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities, SkipSchedule
from growkernels.growth.grown import insertions, rebuild
from growkernels.growth.layer_insertion import LayerInsertion
from growkernels.growth.merits import Merits
from growkernels.growth.neuron_scaling import NeuronScaling
from growkernels.growth.positions import Position, find_positions
from growkernels.growth.triggers import FixedStep, Interval, LossPlateau, MeritRatio, Trigger

__all__ = [
    "BasisSearch",
    "FixedStep",
    "Interval",
    "LayerInsertion",
    "LayerTimes",
    "LossPlateau",
    "MeritRatio",
    "Merits",
    "NeuronScaling",
    "Position",
    "Sensitivities",
    "SkipSchedule",
    "Trigger",
    "find_positions",
    "insertions",
    "rebuild",
]
