"""The public place of DeiT; it lives with the experiments that train it."""

from growkernels.experiments.models.deit import DeiT, deit, split_qkv

__all__ = ["DeiT", "deit", "split_qkv"]
