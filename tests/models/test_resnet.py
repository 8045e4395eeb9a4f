"""ResNet-18 is the published network, and its initial values come from the generator alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from growkernels.experiments.models.resnet import resnet18


@pytest.mark.parametrize(
    ("classes", "width", "count"), [(10, 64, 11_173_962), (100, 64, 11_220_132), (10, 8, 176_402)]
)
def test_has_the_published_number_of_parameters(classes: int, width: int, count: int) -> None:
    with torch.device("meta"):
        model = resnet18(num_classes=classes, width=width)
    assert sum(p.numel() for p in model.parameters()) == count


def test_every_stage_has_its_size_and_the_paths_are_torchvisions() -> None:
    model = resnet18(width=4, num_classes=7).eval()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _, __, out, name=name: shapes.update({name: tuple(out.shape)})
        )
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    assert shapes["conv1"] == shapes["layer1.1.conv2"] == (2, 4, 32, 32)
    assert shapes["layer2.0.downsample.0"] == (2, 8, 16, 16)
    assert shapes["layer3.0.conv1"] == (2, 16, 8, 8)
    assert shapes["layer4.1.bn2"] == (2, 32, 4, 4)
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    expected = ["conv1"]
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            expected += [f"layer{stage}.{block}.conv1", f"layer{stage}.{block}.conv2"]
            if stage > 1 and block == 0:
                expected.append(f"layer{stage}.0.downsample.0")
    assert convolutions == expected


def test_a_block_adds_its_input() -> None:
    """With the second batch norm at zero, a block without downsampling is relu(x)."""
    block = resnet18(width=4).layer1[0]
    nn.init.zeros_(block.get_parameter("bn2.weight"))
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(block(x), x.relu())


def test_the_generator_decides_the_initial_values() -> None:
    def values(seed: int) -> list[torch.Tensor]:
        return list(resnet18(width=8, generator=torch.Generator().manual_seed(seed)).parameters())

    state = torch.get_rng_state()
    first = values(1)
    torch.set_rng_state(state)
    torch.rand(17)
    assert all(torch.equal(a, b) for a, b in zip(first, values(1), strict=True))
    assert not torch.equal(first[0], values(2)[0])


def test_convolutions_have_he_variance() -> None:
    model = resnet18(width=16, generator=torch.Generator().manual_seed(0))
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000:
            expected = math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"stem": "imagenet"}, "stem is 'imagenet'"),
        ({"width": 0}, "width is 0"),
        ({"num_classes": 0}, "num_classes is 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        resnet18(**arguments)  # type: ignore[arg-type]
