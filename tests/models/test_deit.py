"""The vision transformer: sizes, names, initial values and what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.experiments.models.deit import Block, DeiT, DropPath, deit, split_qkv
from growkernels.growth.neuron_scaling import forward_flops

SMALL: dict[str, Any] = {
    "embed": 12,
    "depth": 2,
    "heads": 3,
    "patch": 4,
    "image_size": 8,
    "classes": 5,
}


def small(**changes: Any) -> DeiT:
    return deit(**{**SMALL, "drop_path": 0.0, **changes})


def blocks(model: DeiT) -> list[Block]:
    return [module for module in model.blocks if isinstance(module, Block)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_of_the_paper() -> None:
    with torch.device("meta"):
        full, reduced = deit(classes=100), deit(classes=100, attention_width=192, mlp_width=768)
        imagenet, image = deit(), torch.zeros(1, 3, 224, 224)
    assert parameters(imagenet) == 22_050_664  # timm's deit_small_patch16_224
    assert parameters(full) == 21_704_164
    assert parameters(reduced) == 11_071_204
    # The paper's figures count a multiply and an add as one.
    assert forward_flops(imagenet, image) / 2e9 == pytest.approx(4.6, abs=0.05)
    assert forward_flops(reduced, image) / 2e9 == pytest.approx(2.3, abs=0.05)
    assert blocks(reduced)[0].attn.scale == blocks(full)[0].attn.scale == 64**-0.5


def fused_forward(model: DeiT, state: dict[str, Tensor], images: Tensor) -> Tensor:
    """timm's arithmetic on timm's names, attention by explicit softmax."""
    heads = blocks(model)[0].attn.heads
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for block in ("blocks.0", "blocks.1"):
        n, t, d = x.shape
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (d // heads) ** -0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).reshape(n, t, d), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)), f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def test_a_state_of_timm_loads_and_computes_the_same() -> None:
    model = small().double()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if ".attn.q." in name:
            name, shape = name.replace(".q.", ".qkv."), torch.Size([3 * shape[0], *shape[1:]])
        if ".attn.k." not in name and ".attn.v." not in name:
            state[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    model.load_state_dict(split_qkv(state))
    images = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model(images), fused_forward(model, state, images))
    with pytest.raises(ValueError, match="multiple of 3"):
        split_qkv({"blocks.0.attn.qkv.bias": torch.zeros(4)})


def test_reduced_attention_keeps_the_softmax_scale() -> None:
    """A full attention whose other half of q, k and v is zero computes the same."""
    reduced, full = small(attention_width=6, mlp_width=7).double(), small(mlp_width=7).double()
    state = full.state_dict()
    for name, value in reduced.state_dict().items():
        state[name] = torch.zeros_like(state[name])
        if ".attn." not in name:
            state[name] = value
            continue
        for head in range(3):
            wide, narrow = slice(4 * head, 4 * head + 2), slice(2 * head, 2 * head + 2)
            if ".proj.weight" in name:
                state[name][:, wide] = value[:, narrow]
            elif ".proj.bias" in name:
                state[name] = value
            else:
                state[name][wide] = value[narrow]
    full.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(full(images), reduced(images))


def test_initial_values_come_from_the_generator() -> None:
    def values(seed: int) -> Tensor:
        model = deit(**SMALL, generator=torch.Generator().manual_seed(seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = values(1)
    torch.rand(17)
    assert torch.equal(first, values(1))
    assert not torch.equal(first, values(2))
    model = small(embed=48)
    weight = blocks(model)[1].mlp.fc1.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert not blocks(model)[1].mlp.fc1.bias.any()


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    torch.manual_seed(0)
    dropped = drop(x)
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(x))
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.05)
    assert drop.eval()(x) is x
    rates = [block.drop_path.rate for block in blocks(small(depth=3, drop_path=0.1))]
    assert rates == pytest.approx([0.0, 0.05, 0.1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 10}, "do not divide into patches of 4"),
        ({"embed": 13}, "embed is 13 with 3 heads"),
        ({"attention_width": 8}, "width is 8 with 3 heads"),
        ({"mlp_width": 0}, "at least 1"),
        ({"drop_path": 1.0}, "probability"),
    ],
)
def test_sizes_that_are_no_network(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
