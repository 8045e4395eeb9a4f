"""The SensLI study's convolutional network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from growkernels.nn import Conv2dReLU

KERNEL = 3
HEAD_WIDTH = 500


def vgg(
    widths: Sequence[int],
    layers: Sequence[int] | None = None,
    *,
    classes: int = 10,
    image_size: int = 32,
    head_width: int = HEAD_WIDTH,
    generator: torch.Generator | None = None,
) -> nn.Sequential:
    """A small VGG: stages of 3x3 convolutions with ReLU, each halving the image, and three linears.

    Stage s has ``layers[s]`` convolutions of ``widths[s]`` channels and a 2x2 max pooling; behind
    the stages come Linear-ReLU-Linear-ReLU-Linear, the last without bias (arXiv 2311.15995, the
    authors' CNN code). Input [N, 3, image_size, image_size], output [N, classes]. A layer goes in
    behind any convolution, before the pooling; widths 64, 128, 256 give 2,674,816 parameters.

    Args:
        layers: convolutions per stage; None: one each.
        generator: a CPU generator for the initial values, PyTorch's default distributions
            (uniform in +-1/sqrt(fan_in)); None: the global one.

    Raises:
        ValueError: an image size that the stages do not halve evenly, or a stage without layers.
    """
    counts = [1] * len(widths) if layers is None else list(layers)
    if len(counts) != len(widths) or min(counts) < 1 or min(widths) < 1:
        raise ValueError(
            f"widths {tuple(widths)} and layers {tuple(counts)} do not describe a network; every "
            "stage needs a width and a number of layers of at least 1."
        )
    shrink = 2 ** len(widths)
    if image_size < shrink or image_size % shrink:
        raise ValueError(
            f"Images of {image_size} pixels cannot be halved {len(widths)} times; give a multiple "
            f"of {shrink}."
        )
    stages: list[nn.Module] = []
    channels = 3
    for width, count in zip(widths, counts, strict=True):
        stage: list[nn.Module] = []
        for _ in range(count):
            stage.append(Conv2dReLU(channels, width, KERNEL, padding=1))
            channels = width
        stages.append(nn.Sequential(*stage, nn.MaxPool2d(2)))
    features = channels * (image_size // shrink) ** 2
    head: list[nn.Module] = [nn.Flatten()]
    for inputs in (features, head_width):
        head += [nn.Linear(inputs, head_width), nn.ReLU()]
    model = nn.Sequential(*stages, *head, nn.Linear(head_width, classes, bias=False))
    if generator is not None:
        _initialise(model, generator)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def layers_per_stage(model: nn.Sequential) -> tuple[int, ...]:
    """How many convolutions each stage has, inserted ones included."""
    stages = [module for module in model if isinstance(module, nn.Sequential)]
    return tuple(sum(isinstance(m, nn.Conv2d) for m in stage.modules()) for stage in stages)


@torch.no_grad()
def _initialise(model: nn.Module, generator: torch.Generator) -> None:
    # The bounds of nn.Linear.reset_parameters and nn.Conv2d.reset_parameters.
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)
