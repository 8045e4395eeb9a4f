"""The study's convolutional network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from growkernels.experiments.models.vgg import layers_per_stage, vgg
from growkernels.growth import find_positions


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_of_the_paper() -> None:
    assert parameters(vgg((64, 128, 256))) == 2_674_816
    assert parameters(vgg((200, 200, 200))) == 2_582_000
    for stage, added in enumerate((36_928, 147_584, 590_080)):
        layers = [1 + (stage == s) for s in range(3)]
        assert parameters(vgg((64, 128, 256), layers)) == 2_674_816 + added


def test_output_and_candidate_positions() -> None:
    model = vgg((4, 5, 6), (1, 2, 1), classes=7, image_size=16, head_width=9)
    assert model(torch.randn(3, 3, 16, 16)).shape == (3, 7)
    assert layers_per_stage(model) == (1, 2, 1)
    positions = [p.name for p in find_positions(model, ("conv2d_relu",))]
    assert positions == ["0.0", "1.0", "1.1", "2.0"]


def test_initial_values_come_from_the_generator_with_pytorchs_bounds() -> None:
    def values(seed: int) -> torch.Tensor:
        model = vgg((8, 8, 8), head_width=8, generator=torch.Generator().manual_seed(seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    state = torch.get_rng_state()
    first = values(1)
    torch.set_rng_state(state)
    torch.rand(17)
    assert torch.equal(first, values(1))
    assert not torch.equal(first, values(2))
    model = vgg((8, 8, 8), head_width=8, generator=torch.Generator().manual_seed(1))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.8 * bound < float(module.weight.detach().abs().max()) <= bound
            if module.bias is not None:
                assert float(module.bias.detach().abs().max()) <= bound


@pytest.mark.parametrize(("widths", "layers"), [((4, 4), (1,)), ((4, 0), (1, 1)), ((4, 4), (1, 0))])
def test_shapes_that_are_no_network(widths: tuple[int, ...], layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not describe a network"):
        vgg(widths, layers)


@pytest.mark.parametrize("size", [4, 12])
def test_images_that_cannot_be_halved(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be halved 3 times"):
        vgg((4, 4, 4), image_size=size)
