"""Which convolutions become basis convolutions, with how many filters, and in which epochs."""

from growkernels.growth.basis_search.layer_times import LayerTimes
from growkernels.growth.basis_search.search import BasisSearch
from growkernels.growth.basis_search.sensitivities import Sensitivities
from growkernels.growth.basis_search.skip_schedule import SkipSchedule

__all__ = ["BasisSearch", "LayerTimes", "Sensitivities", "SkipSchedule"]
