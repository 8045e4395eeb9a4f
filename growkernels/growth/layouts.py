"""What the axes of a module's output are: features along the last one, or images [.., C, H, W].

A layer can only be inserted where that is known. It is known behind the layers below and stays
known through what acts on single elements or normalises; anything else, such as a reshape, a
recurrent layer or a module with a forward of its own, makes it unknown until the next such layer.
"""

from __future__ import annotations

from torch import nn

from growkernels.nn import (
    Attention,
    BasisConv2d,
    Conv2dReLU,
    GrownConv2d,
    GrownLinear,
    LinearReLU,
    ResidualBlock,
)
from growkernels.nn.grown_layers import GrownConv2dReLU, GrownLinearReLU

Kinds = tuple[type[nn.Module], ...]

FEATURES: Kinds = (
    *(nn.Linear, GrownLinear, LinearReLU, GrownLinearReLU),
    *(ResidualBlock, Attention),
)
IMAGES: Kinds = (
    *(nn.Conv2d, GrownConv2d, Conv2dReLU, GrownConv2dReLU),
    *(BasisConv2d, nn.ConvTranspose2d),
)

# What acts on each element by itself, so that a new element cannot disturb the others.
ELEMENTWISE: Kinds = (
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.Dropout,
    nn.Identity,
)
KEEPING: Kinds = (
    *ELEMENTWISE,
    *(nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softsign),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink),
    *(nn.LogSigmoid, nn.Threshold, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LocalResponseNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
KEEPING_IMAGES: Kinds = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.FractionalMaxPool2d, nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
)


def runs_as(module: nn.Module, kinds: Kinds) -> bool:
    """Whether a module is of one of these types and computes with the forward of that type."""
    if "forward" in vars(module) or "_conv_forward" in vars(module):
        return False
    own = type(module)
    for kind in kinds:
        if issubclass(own, kind) and own.forward is kind.forward:
            steps = (getattr(own, "_conv_forward", None), getattr(kind, "_conv_forward", None))
            return steps[0] is steps[1]
    return False


def layout_behind(module: nn.Module, before: str | None) -> str | None:
    """``"features"``, ``"images"``, or None where the axes of the output are not known.

    Args:
        before: the same of the module's input.
    """
    if runs_as(module, FEATURES):
        return "features"
    if runs_as(module, IMAGES):
        return "images"
    if runs_as(module, KEEPING) or (before == "images" and runs_as(module, KEEPING_IMAGES)):
        return before
    return None
