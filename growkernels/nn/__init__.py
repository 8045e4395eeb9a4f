"""Layers and blocks that networks grow by."""

from growkernels.nn.attention import Attention
from growkernels.nn.identity_layers import Conv2dReLU, LinearReLU, identity_layer
from growkernels.nn.residual_block import ResidualBlock

__all__ = ["Attention", "Conv2dReLU", "LinearReLU", "ResidualBlock", "identity_layer"]
