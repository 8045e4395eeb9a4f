"""Base merits are of the weight that a layer computes with, whatever it is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.spectral_norm import spectral_norm as hooked_spectral_norm
from torch.nn.utils.weight_norm import weight_norm as hooked_weight_norm

from growkernels.growth import BasisSearch, LayerInsertion, NeuronScaling
from growkernels.nn import BasisConv2d, convert
from growkernels.nn.weights import current_value


class Sign(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.tanh()


def assigned(layer: nn.Module) -> None:
    own = layer.weight
    del layer.weight
    layer.register_parameter("weight_own", own)
    layer.register_forward_pre_hook(lambda m, _: setattr(m, "weight", m.weight_own.sin()))


MAKE: dict[str, Callable[[nn.Module], object]] = {
    "parameter": lambda layer: layer,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "custom": lambda layer: parametrize.register_parametrization(layer, "weight", Sign()),
    "old weight_norm": hooked_weight_norm,
    "old spectral_norm": hooked_spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.4),
    "assigned": assigned,
}
made = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
    ).double()


def cnn() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(20, 3),
    ).double()


def batches(shape: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, *shape, generator=generator, dtype=torch.float64), torch.arange(6) % 3)
        for _ in range(3)
    ]


def expected_base(model: nn.Sequential, data: list[tuple[Tensor, Tensor]], kind: type) -> float:
    """From a model in which every weight is an ordinary parameter of the current value."""
    plain = nn.Sequential()
    for module in model:
        if isinstance(module, BasisConv2d):
            plain.append(module.to_conv())
        elif isinstance(module, nn.Linear | nn.Conv2d):
            weight = current_value(module)
            new: nn.Linear | nn.Conv2d
            if isinstance(module, nn.Linear):
                new = nn.Linear(module.in_features, module.out_features)
            else:
                new = nn.Conv2d(
                    module.in_channels, module.out_channels, 3, module.stride, module.padding
                )
            new = new.double()
            new.weight.data.copy_(weight)
            new.bias.data.copy_(module.bias.data)  # type: ignore[union-attr]
            plain.append(new)
        else:
            plain.append(copy.deepcopy(module))
    weights = [m.weight for m in plain if isinstance(m, kind)]
    total = sum(F.cross_entropy(plain(x), y) for x, y in data) / len(data)
    norms = [g.square().sum() for g in torch.autograd.grad(total, weights)]  # type: ignore[arg-type]
    return float(torch.stack(norms).mean())


def recorded(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> LayerInsertion:
    inserter = LayerInsertion(model)
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()  # outside of a recording
    for x, y in data:
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
    return inserter


@made
@pytest.mark.parametrize("training", [False, True])
def test_base_merits_of_linear_layers(make: Callable[[nn.Module], object], training: bool) -> None:
    model = mlp()
    make(model[0])
    make(model[4])
    data = batches((4,))
    model(data[0][0])
    if training and "spectral" in str(make):
        pytest.skip("in training mode the weight changes from batch to batch")
    model.train(training)
    base = recorded(model, data).merits().base
    assert base == pytest.approx(expected_base(model, data, nn.Linear), rel=1e-9)


@made
def test_base_merits_of_convolutions(make: Callable[[nn.Module], object]) -> None:
    model = cnn()
    make(model[0])
    data = batches((2, 7, 7))
    model(data[0][0])
    model.eval()
    inserter = recorded(model, data)
    expected = expected_base(model, data, nn.Conv2d)
    assert inserter.merits().base == pytest.approx(expected, rel=1e-9)
    inserter.norm = "operator"
    assert inserter.merits().base > 0


@pytest.mark.parametrize("init", ["svd", "select"])
def test_base_merits_of_basis_convolutions(init: str) -> None:
    model = cnn()
    convert(model, {"0": 2, "2": 3}, init=init)
    assert all(isinstance(model[i], BasisConv2d) for i in (0, 2))
    data = batches((2, 7, 7))
    inserter = recorded(model, data)
    assert [p.name for p in inserter.positions] == ["1", "3"]
    expected = expected_base(model, data, nn.Conv2d)
    assert inserter.merits().base == pytest.approx(expected, rel=1e-9)


def test_tied_and_frozen_weights() -> None:
    model, data = mlp(), batches((4,))
    for index in (0, 2, 4):
        prune.identity(model[index], "weight")
    tied = nn.Sequential(*model[:3], nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), model[4]).double()
    prune.identity(tied[4], "weight")
    tied[4].weight_orig = tied[2].weight_orig
    model[0].weight_orig.requires_grad_(False)
    base = recorded(tied, data).merits().base
    weight = tied[2].weight_orig.detach().clone().requires_grad_()
    last = tied[6].weight_orig.detach().clone().requires_grad_()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        h = F.linear(x, tied[0].weight_orig, tied[0].bias).relu()
        h = F.linear(h, weight, tied[2].bias).relu()
        h = F.linear(h, weight, tied[4].bias).relu()
        return F.cross_entropy(F.linear(h, last, tied[6].bias), y)

    total = sum(loss(x, y) for x, y in data) / len(data)
    norms = [g.square().sum() for g in torch.autograd.grad(total, [weight, last])]  # type: ignore[arg-type]
    assert base == pytest.approx(float(torch.stack(norms).mean()), rel=1e-9)


@made
def test_an_insertion_joins_the_groups_of_what_weights_are_made_of(
    make: Callable[[nn.Module], object],
) -> None:
    model = mlp()
    for index in (0, 2, 4):
        make(model[index])
    data = batches((4,))
    model(data[0][0])
    front = [p for index in (0, 2) for p in model[index].parameters()]
    optimizer = torch.optim.SGD(
        [{"params": front, "lr": 0.001}, {"params": list(model[4].parameters()), "lr": 0.1}],
        momentum=0.9,
    )
    inserter = recorded(model, data)
    new = inserter.insert("3", optimizer, sample=data[0][0])
    slow = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(p) for p in new.parameters()} <= slow
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    optimizer.step()


def test_a_basis_convolution_decides_the_group_of_what_follows() -> None:
    model = nn.Sequential(
        BasisConv2d(2, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model[0].parameters()), "lr": 0.001},
            {"params": [*model[1].parameters(), *model[4].parameters()], "lr": 0.1},
        ]
    )
    inserter = LayerInsertion(model)
    assert [(p.name, p.kind) for p in inserter.positions] == [("2", "conv2d_relu")]
    with inserter.recording():
        F.cross_entropy(model(torch.randn(6, 2, 3, 3)), torch.arange(6) % 3).backward()
    new = inserter.insert("2", optimizer)
    slow = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert {id(new.weight), id(new.bias)} <= slow


@made
def test_neurons_of_computed_weights(make: Callable[[nn.Module], object]) -> None:
    """A branch beside a weight that a hook computes; parametrized layers say why not."""
    model, x = mlp(), torch.randn(6, 4, dtype=torch.float64)
    make(model[0])
    model(x)
    model.eval()
    if "parametrizations" in model[0]._modules:
        scaling = NeuronScaling(model, "magnitude")
        assert "computed by a parametrization" in scaling.left_out["0"]
        with pytest.raises(ValueError, match="computed by a parametrization"):
            NeuronScaling(model, "magnitude", layers=["0"])
        return
    with torch.no_grad():  # a hook's attribute is stale after an optimizer's step
        for parameter in model[0].parameters():
            parameter.mul_(1.5)
    before = model(x)
    scaling = NeuronScaling(model, "magnitude", layers=["0"], form="gated")
    scores = scaling.scores()
    torch.testing.assert_close(scores.values["0"], -current_value(model[0]).norm(dim=1))
    scaling.grow(scaling.select(scores, budget=200, min_eligible=1), sample=x)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


WEIGHTS: dict[str, Callable[[nn.Module], object]] = {
    "mask on a weight": lambda model: model[2].weight.register_hook(lambda g: g),
    "mask on a bias": lambda model: model[2].bias.register_hook(lambda g: g),
    "mask on a column's weight": lambda model: model[4].weight.register_hook(lambda g: g),
    "post-accumulate": lambda model: model[2].weight.register_post_accumulate_grad_hook(
        lambda p: None
    ),
}


@pytest.mark.parametrize("hook", WEIGHTS.values(), ids=WEIGHTS)
def test_widening_does_not_lose_hooks(hook: Callable[[nn.Module], object]) -> None:
    model = mlp()
    scaling = NeuronScaling(model, "magnitude", layers=["0", "2"], widen=("fc1",))
    chosen = scaling.select(scaling.scores(), budget=200, min_eligible=1)
    assert set(chosen.neurons) == {"0", "2"}
    hook(model)
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match=r"cannot be widened: its .* carries hooks"):
        scaling.grow(chosen)
    assert dict(model.named_parameters()) == parameters


def test_deepening_keeps_hooks() -> None:
    model = mlp()
    model[0].weight.register_hook(lambda g: g * 0)
    scaling = NeuronScaling(model, "magnitude", layers=["0"])
    scaling.grow(scaling.select(scaling.scores(), budget=200, min_eligible=1))
    F.cross_entropy(model(torch.randn(6, 4).double()), torch.arange(6) % 3).backward()
    assert not bool(model[0].weight.grad.any())


@made
def test_a_layer_that_cannot_be_widened_says_why(make: Callable[[nn.Module], object]) -> None:
    model = mlp()
    make(model[2])
    model(torch.ones(1, 4).double())
    if make is MAKE["parameter"]:
        NeuronScaling(model, "magnitude", layers=["0"], widen=("fc1",))
        return
    with pytest.raises(ValueError, match=r"'0' would fit, but of '2' its weight is .*comput"):
        NeuronScaling(model, "magnitude", layers=["0"], widen=("fc1",))


def test_basis_search_beside_pruned_layers() -> None:
    model = cnn().float()
    prune.l1_unstructured(model[2], "weight", amount=0.3)
    prune.l1_unstructured(model[5], "weight", amount=0.3)
    search = BasisSearch(model, (0.5,))
    assert set(search.candidates) == {"0"}
    data = [(x.float(), y) for x, y in batches((2, 7, 7))]
    for _ in range(2):
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()  # leaves computed weights behind
        costs = search.sensitivities("taylor", batches=data)
        assert set(costs.costs) == {"0"}
    trained = search.sensitivities(
        "train", train=lambda network, _: float(network(data[0][0]).sum())
    )
    assert set(trained.costs) == {"0"}
