"""SensLI: insert the layer whose virtual parameters have the largest gradient (2311.15995)."""

from growkernels.growth.layer_insertion.driver import LayerInsertion
from growkernels.growth.layer_insertion.merit_norms import NORMS
from growkernels.growth.layer_insertion.merits import Merits
from growkernels.growth.layer_insertion.positions import Position, find_positions

__all__ = ["NORMS", "LayerInsertion", "Merits", "Position", "find_positions"]
