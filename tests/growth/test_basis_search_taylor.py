"""Predicted loss increases against exact second-order terms and against what really happens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional as F

from growkernels.growth.basis_search import BasisSearch, Sensitivities
from growkernels.nn import convert

Batch = tuple[Tensor, Tensor]


def linear_net() -> nn.Sequential:
    """Logits are linear in either kernel alone: the Gauss-Newton matrix is its exact Hessian."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(4 * 16, 3)
    ).double()


def normed_net() -> nn.Sequential:
    """A convolution in front of a batch norm, and one whose scale matters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    ).double()


def batch(size: int = 8, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (size,), generator=generator)


def truncated(weight: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    values[rank:] = 0
    return (left @ values.diag() @ right).view_as(weight)


def exact_change(model: nn.Module, name: str, direction: Tensor, data: Batch) -> float:
    """<g, D> + 1/2 mean of (J D)' (diag p - p p') (J D), by forward-mode differentiation."""
    x, y = data
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # running statistics would be written to
            module.running_mean = module.running_var = module.num_batches_tracked = None
    kernel = model.get_parameter(name).detach()

    def logits_of(weight: Tensor) -> Tensor:
        out: Tensor = functional_call(model, {name: weight}, (x,))
        return out

    logits, change = jvp(logits_of, (kernel,), (direction,))
    p = logits.softmax(1)
    first = ((p - F.one_hot(y, 3)) * change).sum(1).mean()
    second = ((p * change.square()).sum(1) - (p * change).sum(1).square()).mean()
    return float((first + second / 2).detach())


def predictions(model: nn.Module, data: list[Batch], **options: object) -> Sensitivities:
    return BasisSearch(model, (0.25, 0.5, 0.75)).sensitivities("taylor", batches=data, **options)


def test_linear_network_has_the_second_derivative_of_the_loss() -> None:
    model, data = linear_net(), batch()
    found = predictions(model, [data] * 150)
    assert found.method == "taylor"
    assert {path: list(costs) for path, costs in found.costs.items()} == {
        "0": [2, 3, 4],
        "1": [1, 2, 3],
    }
    for path, costs in found.costs.items():
        weight = model.get_submodule(path).weight
        for rank, cost in costs.items():
            change = truncated(weight, rank) - weight.detach()

            def loss_at(step: Tensor, path: str = path, change: Tensor = change) -> Tensor:
                kernel = {f"{path}.weight": model.get_submodule(path).weight + step * change}
                return F.cross_entropy(functional_call(model, kernel, (data[0],)), data[1])

            zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(loss_at(zero), zero, create_graph=True)
            (curvature,) = torch.autograd.grad(slope, zero)
            exact = float((slope + curvature / 2).detach())
            assert exact_change(model, f"{path}.weight", change, data) == pytest.approx(exact)
            assert found.errors[path][rank] < 0.1 * float(curvature.detach() / 2)
            assert abs(cost - exact) < 4 * found.errors[path][rank]
    assert found.baseline == pytest.approx(F.cross_entropy(model(data[0]), data[1]).item())


def test_scale_is_free_behind_a_batch_norm_only() -> None:
    model, data = normed_net(), batch()
    found = predictions(model, [data] * 150)
    for path, rescaled in (("0", True), ("3", False)):
        weight = model.get_submodule(path).weight.detach()
        for rank, cost in found.costs[path].items():
            near = truncated(weight, rank)
            if rescaled:
                lengths = weight.flatten(1).norm(dim=1) / near.flatten(1).norm(dim=1)
                near = near * lengths[:, None, None, None]
            exact = exact_change(model, f"{path}.weight", near - weight, data)
            other = exact_change(model, f"{path}.weight", truncated(weight, rank) - weight, data)
            error = found.errors[path][rank]
            assert abs(cost - exact) < 4 * error
            if rescaled and rank == 2:
                assert abs(exact - other) > 6 * error, "the two hypotheses cannot be told apart"


@pytest.mark.parametrize(("build", "size"), [(linear_net, 0.03), (normed_net, 0.001)])
def test_small_truncation_costs_what_is_predicted(
    build: Callable[[], nn.Sequential], size: float
) -> None:
    """In the normed network the network's own curvature counts too, so only the slope is tested."""
    model, data = build(), batch(64)
    for path in BasisSearch(model).candidates:
        weight = model.get_submodule(path).weight
        rank = max(1, weight.shape[0] // 4)
        with torch.no_grad():  # nearly of this rank
            weight.copy_(truncated(weight, rank) + size * weight)
    search = BasisSearch(model, (0.25,))
    found = search.sensitivities("taylor", batches=[data] * 20)
    for path, costs in found.costs.items():
        for rank, cost in costs.items():
            changed = copy.deepcopy(model)
            convert(changed, {path: rank})
            with torch.no_grad():
                actual = float(F.cross_entropy(changed(data[0]), data[1])) - found.baseline
            assert cost == pytest.approx(actual, rel=0.03)


def test_order_of_predictions_is_that_of_measured_losses() -> None:
    """A network that learned something: every layer converted in turn, batch norms in training."""
    torch.manual_seed(3)
    prototypes = torch.randn(4, 3, 8, 8)
    y = torch.arange(256) % 4
    x = prototypes[y] + 1.5 * torch.randn(256, 3, 8, 8)
    widths = [3, 8, 12, 16, 12]
    layers: list[nn.Module] = []
    for number, (a, b) in enumerate(pairwise(widths)):
        stride = 2 if number % 2 else 1
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(60):
        part = torch.arange(64) + 64 * (step % 4)
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    found = predictions(model, list(zip(x.split(32), y.split(32), strict=True)))
    predicted, measured = [], []
    with torch.no_grad():
        base = float(F.cross_entropy(model(x), y))
        for path, costs in found.costs.items():
            for rank, cost in costs.items():
                changed = copy.deepcopy(model)
                convert(changed, {path: rank})
                predicted.append(cost)
                measured.append(float(F.cross_entropy(changed(x), y)) - base)
    ranks = torch.tensor([predicted, measured]).argsort(1).argsort(1).double()
    assert len(predicted) >= 10
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.9


def test_repeatable_and_nothing_changes_in_the_model() -> None:
    model = normed_net()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    data = [batch(8, 1), batch(5, 2)]
    first, again = (predictions(model, data) for _ in range(2))
    assert first.costs == again.costs
    assert first.errors == again.errors
    other = predictions(model, data, generator=torch.Generator().manual_seed(7))
    assert other.costs != first.costs
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model[0].weight.requires_grad


def test_batches_count_by_their_size() -> None:
    """First-order terms and losses of unequal batches add up to those of all samples."""
    model = linear_net()
    x, y = batch(12)

    def steep(logits: Tensor, targets: Tensor) -> Tensor:
        return 1e6 * F.cross_entropy(logits, targets)  # hides the random term

    parts = [(x[:3], y[:3]), (x[3:], y[3:])]
    split = predictions(model, parts, loss_fn=steep)
    whole = predictions(model, [(x, y)], loss_fn=steep)
    assert split.baseline == pytest.approx(whole.baseline)
    for path, costs in whole.costs.items():
        assert split.costs[path] == pytest.approx(costs, rel=1e-4)
        assert all(math.isnan(error) for error in whole.errors[path].values())
        assert all(error > 0 for error in split.errors[path].values())


def test_bad_input_is_one_sentence() -> None:
    model = linear_net()
    x, y = batch()
    with pytest.raises(ValueError, match=r"^Method 'taylor' needs batches="):
        BasisSearch(model).sensitivities("taylor")
    with pytest.raises(ValueError, match=r"^There are no calibration batches"):
        predictions(model, [])
    with pytest.raises(ValueError, match=r"^draws is 0"):
        predictions(model, [(x, y)], draws=0)
    with pytest.raises(ValueError, match=r"needs logits \[N, classes\]"):
        predictions(model[:2], [(x, y)])
    with pytest.raises(ValueError, match=r"return the mean over the batch"):
        predictions(model, [(x, y)], loss_fn=nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"^The loss of a calibration batch is nan"):
        predictions(model, [(x * float("nan"), y)])

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = linear_net(), nn.Conv2d(3, 6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    with pytest.raises(RuntimeError, match=r"does not depend on layer 'spare'"):
        predictions(Unused(), [(x, y)])
