"""Several optimizers of one model do what one with their groups does, under every surgery."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from scaling_networks import batches, small_cnn, small_deit
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import functional as F
from torch.optim import SGD, AdamW, Muon, Optimizer
from training import Batches, record

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import convert

Optimizers = Sequence[Optimizer]
Surgery = Callable[[nn.Module, Optimizer | Optimizers], None]


def weights_and_biases(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9)


def train(model: nn.Module, optimizers: Optimizers, data: Batches) -> None:
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for optimizer in optimizers:
            optimizer.step()


def insert(model: nn.Module, optimizer: Optimizer | Optimizers) -> None:
    inserter = LayerInsertion(model, ["act1", "act2"])
    record(inserter, batches(model, 2))
    inserter.insert("act2", optimizer)
    inserter.close()


def grow(model: nn.Module, optimizer: Optimizer | Optimizers) -> None:
    scaling = NeuronScaling(model, "magnitude", kinds=("conv2d", "linear"))
    chosen = scaling.select(scaling.scores(), 200, min_eligible=1)
    scaling.grow(chosen, optimizer)
    scaling.close()


def exchange(model: nn.Module, optimizer: Optimizer | Optimizers) -> None:
    convert(model, {"conv1": 2}, optimizer)


@pytest.mark.parametrize("surgery", [insert, grow, exchange], ids=lambda f: f.__name__)
def test_two_do_what_one_with_two_groups_does(surgery: Surgery) -> None:
    model = small_cnn()
    if surgery is insert:
        model.act1, model.act2 = nn.ReLU(), nn.ReLU()
    data = batches(model, 4)
    results: list[list[Tensor]] = []
    states: list[list[Tensor]] = []
    for together in (True, False):
        network = copy.deepcopy(model)
        weights, biases = weights_and_biases(network)
        if together:
            optimizers = [SGD([{"params": weights}, {"params": biases}], lr=0.05, momentum=0.9)]
        else:
            optimizers = [sgd(weights), sgd(biases)]
        train(network, optimizers, data[:2])
        surgery(network, optimizers[0] if together else optimizers)
        train(network, optimizers, data[2:])
        results.append(list(network.parameters()))
        states.append(
            [
                state["momentum_buffer"]
                for p in network.parameters()
                for optimizer in optimizers
                if (state := optimizer.state.get(p)) is not None
            ]
        )
        held = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        assert {id(p) for p in held} == {id(p) for p in network.parameters()}
    for one, two in zip(results[0] + states[0], results[1] + states[1], strict=True):
        assert torch.equal(one, two)


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = small_deit(torch.float32)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizers = [Muon(matrices, lr=1e-2), AdamW(rest, lr=1e-2)]
    data = batches(model, 2)
    train(model, optimizers, data)
    scaling = NeuronScaling(model, widen=("fc1",))
    record(scaling, data)
    scaling.grow(scaling.select(scaling.scores(), 500, min_eligible=1), tuple(optimizers))
    train(model, optimizers, data)
    for optimizer, is_matrix in zip(optimizers, (True, False), strict=True):
        (group,) = optimizer.param_groups
        assert all((p.dim() == 2) == is_matrix for p in group["params"])
        assert set(optimizer.state) == set(group["params"])
    resumed = small_deit(torch.float32)
    fresh = [
        Muon([p for p in resumed.parameters() if p.dim() == 2], lr=1e-2),
        AdamW([p for p in resumed.parameters() if p.dim() != 2], lr=1e-2),
    ]
    rebuild(resumed, insertions(model), fresh)
    for mine, other in zip(optimizers, fresh, strict=True):
        shapes = [p.shape for p in mine.param_groups[0]["params"]]
        assert [p.shape for p in other.param_groups[0]["params"]] == shapes


def test_what_no_given_optimizer_holds_is_said() -> None:
    model = small_cnn()
    weights, _ = weights_and_biases(model)
    with pytest.warns(UserWarning, match="touches 'bias' of a layer, which no given optimizer"):
        grow(model, sgd(weights))
    model = small_cnn()
    with pytest.warns(UserWarning, match="touches 'weight' of a layer"):
        convert(model, {"conv1": 2}, sgd(weights_and_biases(model)[1]))


def test_optimizers_that_step_in_the_backward_pass_are_refused() -> None:
    model = small_cnn()
    _apply_optimizer_in_backward(SGD, model.parameters(), {"lr": 0.1})
    sentence = "optimizers that step in the backward pass, which new parameters would not have"
    refused: list[Callable[[], object]] = [
        lambda: convert(model, {"conv1": 2}),
        lambda: LayerInsertion(model),
        lambda: NeuronScaling(model),
        lambda: rebuild(model, []),
    ]
    for surgery in refused:
        with pytest.raises(TypeError, match=sentence):
            surgery()


def test_several_that_cannot_be_one() -> None:
    model = small_cnn()
    weights, _ = weights_and_biases(model)
    with pytest.raises(ValueError, match="hold the same parameter"):
        convert(model, {"conv1": 2}, [sgd(weights), sgd(weights)])
    with pytest.raises(ValueError, match="list of optimizers is empty"):
        convert(model, {"conv1": 2}, [])
    with pytest.raises(TypeError, match="One of the optimizers is a str"):
        convert(model, {"conv1": 2}, ["adam"])  # type: ignore[list-item]


def test_an_error_takes_back_all_of_them() -> None:
    model = small_cnn()
    weights, biases = weights_and_biases(model)
    optimizers = [Muon([weights[-1]], lr=1e-2), sgd(weights[:-1] + biases)]
    train(model, optimizers, batches(model, 1))
    before = [[id(p) for p in o.param_groups[0]["params"]] for o in optimizers]
    states = [list(map(id, o.state)) for o in optimizers]
    parameters = [id(p) for p in model.parameters()]
    scaling = NeuronScaling(model, "magnitude", kinds=("conv2d", "linear"), layers=["*"])
    chosen = scaling.select(scaling.scores(), 600, min_eligible=1)
    model.register_forward_hook(lambda module, args, y: y + torch.rand(1))
    with pytest.raises(RuntimeError, match="would change the network's output"):
        scaling.grow(chosen, optimizers, sample=batches(model, 1)[0][0])
    assert [[id(p) for p in o.param_groups[0]["params"]] for o in optimizers] == before
    assert [list(map(id, o.state)) for o in optimizers] == states
    assert [id(p) for p in model.parameters()] == parameters
