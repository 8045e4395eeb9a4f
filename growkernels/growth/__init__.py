"""Drivers that let networks grow while they train."""

from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities, SkipSchedule
from growkernels.growth.layer_insertion.insertion import insertions, rebuild
from growkernels.growth.layer_insertion import LayerInsertion
from growkernels.growth.layer_insertion.merits import Merits
from growkernels.growth.neuron_scaling import NeuronScaling
from growkernels.growth.layer_insertion.positions import Position, find_positions
from growkernels.growth.layer_insertion.triggers import FixedStep, Interval, LossPlateau, MeritRatio, Trigger

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
