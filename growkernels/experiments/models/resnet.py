"""ResNet-18, for images of 32x32 pixels and the like."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)) (He et al., arXiv 1512.03385).

    The first 3x3 convolution has the stride. Where shapes change, the shortcut is a 1x1
    convolution of that stride and a batch norm; elsewhere the identity.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + shortcut, inplace=True)


class ResNet(nn.Module):
    """Four stages of two basic blocks, with the module paths of torchvision's ResNet-18.

    Input [N, 3, H, W] with H and W of at least 1 (32 in the papers), output [N, num_classes].
    Build one with :func:`resnet18`.
    """

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.fc = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.layer4(self.layer3(self.layer2(self.layer1(h))))
        logits: Tensor = self.fc(h.mean((2, 3)))
        return logits


def resnet18(
    num_classes: int = 10,
    stem: str = "cifar",
    width: int = 64,
    generator: torch.Generator | None = None,
) -> ResNet:
    """ResNet-18 for small images (He et al., arXiv 1512.03385, sections 3.4 and 4.2).

    Its stem is one 3x3 convolution of stride 1 without pooling, so a 32x32 image reaches the
    stages at full size. Module paths are torchvision's (``conv1``, ``layer1.0.conv1``,
    ``layer2.0.downsample.0``, ``fc``). 11,173,962 parameters with ten classes. Parameters are
    contiguous; ``model.to(memory_format=torch.channels_last)`` converts them.

    Args:
        stem: ``"cifar"``, the only one written out.
        width: channels of the first stage; the others have two, four and eight times as many.
        generator: a CPU generator for the initial values; None: the global one. Convolutions are
            normal with variance 2 / (Cout kh kw) (He et al., arXiv 1502.01852, keeping the
            gradients' variance), batch norms start as the identity, the classifier is uniform in
            +-1/sqrt(fan_in).

    Raises:
        ValueError: another stem, or fewer than one class or channel.
    """
    if stem != "cifar":
        raise ValueError(
            f"stem is {stem!r}; 'cifar', a 3x3 convolution without pooling, is the one there is."
        )
    if num_classes < 1 or width < 1:
        raise ValueError(
            f"num_classes is {num_classes} and width is {width}; both must be at least 1."
        )
    model = ResNet(num_classes, width)
    _initialise(model, generator)
    return model


def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, 1)
    )


@torch.no_grad()
def _initialise(model: nn.Module, generator: torch.Generator | None) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_out), generator=generator)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            module.bias.uniform_(-bound, bound, generator=generator)
