"""Layers and blocks that networks grow by, and layers that train fewer parameters."""

from growkernels.nn.attention import Attention
from growkernels.nn.basis_conv2d import BasisConv2d
from growkernels.nn.convert import Conversion, ConvertedLayer, convert
from growkernels.nn.grown_layers import GrownConv2d, GrownLinear
from growkernels.nn.identity_layers import Conv2dReLU, LinearReLU, identity_layer
from growkernels.nn.linear_from_conv1d import Transposition, linear_from_conv1d
from growkernels.nn.residual_block import ResidualBlock
from growkernels.nn.separate_attention import Separation, separate_attention

__all__ = [
    "Attention",
    "BasisConv2d",
    "Conv2dReLU",
    "Conversion",
    "ConvertedLayer",
    "GrownConv2d",
    "GrownLinear",
    "LinearReLU",
    "ResidualBlock",
    "Separation",
    "Transposition",
    "convert",
    "identity_layer",
    "linear_from_conv1d",
    "separate_attention",
]
