"""Drivers that let networks grow while they train."""

from growkernels.growth.basis_search import BasisSearch, LayerTimes, Sensitivities, SkipSchedule
from growkernels.growth.describe import Description, describe
from growkernels.growth.layer_insertion import (
    FixedStep,
    Interval,
    LayerInsertion,
    LossPlateau,
    MeritRatio,
    Merits,
    Position,
    Trigger,
    find_positions,
)
from growkernels.growth.monitor import Monitor
from growkernels.growth.neuron_scaling import NeuronScaling, share_budget
from growkernels.growth.records import insertions, rebuild
from growkernels.growth.state import grow_state
from growkernels.growth.warm_up import WarmUp

__all__ = [
    "BasisSearch",
    "Description",
    "FixedStep",
    "Interval",
    "LayerInsertion",
    "LayerTimes",
    "LossPlateau",
    "MeritRatio",
    "Merits",
    "Monitor",
    "NeuronScaling",
    "Position",
    "Sensitivities",
    "SkipSchedule",
    "Trigger",
    "WarmUp",
    "describe",
    "find_positions",
    "grow_state",
    "insertions",
    "rebuild",
    "share_budget",
]
