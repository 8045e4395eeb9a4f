"""The public place of ResNet-18; it lives with the experiments that train it."""

from growkernels.experiments.models.resnet import BasicBlock, ResNet, resnet18

__all__ = ["BasicBlock", "ResNet", "resnet18"]
