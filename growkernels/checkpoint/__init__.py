"""Checkpoints of grown models on torch.distributed.checkpoint, for any number of processes.

What a model has grown by is read first, so the model that the states are loaded into has grown as
well, whatever the code that builds it knows of growth. Floor 4.
"""

from growkernels.checkpoint.loading import Restored, latest, load
from growkernels.checkpoint.saving import save

__all__ = ["Restored", "latest", "load", "save"]
