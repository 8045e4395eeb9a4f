"""Packed attention of others becomes four linear layers; the network and its training go on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.nn import Attention, separate_attention

EMBED, HEADS = 12, 3


class Block(nn.Module):
    """The structure of torchvision's EncoderBlock."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        options = {"batch_first": True, **changes}
        self.norm = nn.LayerNorm(EMBED)
        self.attention = nn.MultiheadAttention(EMBED, HEADS, **options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = x + self.attention(y, y, y, need_weights=False)[0]
        return out


def model(**changes: Any) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(Block(**changes), Block(**changes), nn.Linear(EMBED, 2)).double()


def tokens(seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, EMBED, generator=generator, dtype=torch.float64)


def optimizer(network: nn.Module, name: str, named: bool = False) -> torch.optim.Optimizer:
    """Weights decay and biases do not, as usual."""
    parameters = list(network.named_parameters())
    weights = [(n, p) for n, p in parameters if p.dim() > 1]
    biases = [(n, p) for n, p in parameters if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": group if named else [p for _, p in group], "weight_decay": decay}
        for group, decay in ((weights, 0.1), (biases, 0.0))
    ]
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.01)


def train(network: nn.Module, steps: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        steps.zero_grad()
        F.mse_loss(network(tokens(seed)), torch.ones(4, 5, 2, dtype=torch.float64)).backward()
        steps.step()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_network_computes_what_it_did(bias: bool, training: bool) -> None:
    network = model(bias=bias).train(training)
    expected = network(tokens())
    kept = network[0].attention.out_proj.weight
    random = torch.get_rng_state()
    done = separate_attention(network)
    assert torch.equal(torch.get_rng_state(), random)
    assert done.exchanged == ("0.attention", "1.attention")
    assert done.skipped == {}
    torch.testing.assert_close(network(tokens()), expected, rtol=1e-12, atol=1e-12)
    attention = network[0].attention
    assert isinstance(attention, Attention)
    assert attention.training == training
    assert attention.proj.weight is kept
    layers = [attention.q, attention.k, attention.v, attention.proj]
    assert [type(layer) for layer in layers] == [nn.Linear] * 4
    assert all((layer.bias is not None) == bias for layer in layers)
    assert not any(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("named", [True, False])
def test_training_goes_on_as_it_would_have(name: str, named: bool) -> None:
    network = model()
    steps = optimizer(network, name, named)
    train(network, steps, range(3))
    other = copy.deepcopy(network)
    others_steps = optimizer(other, name)
    others_steps.load_state_dict(copy.deepcopy(steps.state_dict()))
    separate_attention(network, steps)
    train(network, steps, range(3, 6))
    train(other, others_steps, range(3, 6))
    torch.testing.assert_close(network(tokens()), other(tokens()), rtol=1e-10, atol=1e-10)
    assert set(steps.state) == set(network.parameters())
    packed = other[1].attention.in_proj_weight.chunk(3)
    for layer, weight in zip("qkv", packed, strict=True):
        own = network[1].attention.get_submodule(layer).weight
        torch.testing.assert_close(own, weight, rtol=1e-10, atol=1e-10)
    if named:
        for group in steps.param_groups:
            assert [dict(network.named_parameters())[n] for n in group["param_names"]] == group[
                "params"
            ]


def test_dropout_stays() -> None:
    network = model(dropout=0.5)
    evaluated = network.eval()(tokens())
    separate_attention(network)
    torch.testing.assert_close(network(tokens()), evaluated, rtol=1e-12, atol=1e-12)
    network.train()
    assert not torch.allclose(network(tokens()), network(tokens()))


def test_frozen_attention_stays_frozen() -> None:
    network = model()
    network[0].attention.requires_grad_(False)
    separate_attention(network)
    frozen = network[0].attention.parameters()
    assert not any(parameter.requires_grad for parameter in frozen)
    assert all(parameter.requires_grad for parameter in network[1].parameters())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kdim": 4}, "its keys and values have other widths"),
        ({"batch_first": False}, "it is not batch_first"),
        ({"add_bias_kv": True}, "it adds keys of its own"),
        ({"add_zero_attn": True}, "it adds keys of its own"),
    ],
)
def test_other_attention_is_left_alone_with_the_reason(
    changes: dict[str, Any], reason: str
) -> None:
    network = model()
    network.append(Block(**changes))
    done = separate_attention(network)
    assert done.exchanged == ("0.attention", "1.attention")
    assert reason in done.skipped["3.attention"]


def test_what_is_shared_hooked_or_read_by_torch_is_left_alone() -> None:
    network = model()
    network[1].attention = network[0].attention
    network.append(Block())
    network[3].attention.register_forward_hook(lambda *_: None)
    network.append(nn.TransformerEncoderLayer(EMBED, HEADS, batch_first=True))
    with pytest.raises(ValueError, match="has no attention to separate") as error:
        separate_attention(network)
    for reason in ("used in several places", "carries hooks", "TransformerEncoderLayer reads"):
        assert reason in str(error.value)


def test_calls_that_are_not_plain_self_attention_are_refused() -> None:
    network = model()
    separate_attention(network)
    attention, x = network[0].attention, tokens()
    with pytest.raises(ValueError, match="is self-attention: pass one tensor"):
        attention(x, x + 1, x, need_weights=False)
    with pytest.raises(ValueError, match="does not return its weights"):
        attention(x, x, x)
    with pytest.raises(ValueError, match="takes no masks"):
        attention(x, x, x, need_weights=False, attn_mask=torch.zeros(5, 5))


def test_bad_arguments_leave_everything_untouched() -> None:
    network = model()
    steps = optimizer(network, "adamw")
    train(network, steps, range(2))
    weight = network[0].attention.in_proj_weight
    with pytest.raises(ValueError, match="has no attention to separate"):
        separate_attention(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="it is the model itself"):
        separate_attention(network[0].attention)
    with pytest.raises(TypeError, match="is wrapped in DataParallel"):
        separate_attention(nn.DataParallel(network))
    with pytest.raises(ValueError, match="holds no parameter of the model"):
        separate_attention(network, optimizer(model(), "sgd"))
    # The second module's state cannot be cut; the first one is exchanged by then.
    steps.state[network[1].attention.in_proj_weight]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"'exp_avg' of shape \(3,\) .* cannot be cut"):
        separate_attention(network, steps)
    assert network[0].attention.in_proj_weight is weight
    assert set(steps.state) == set(network.parameters())
