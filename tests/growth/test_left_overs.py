"""What drivers leave on a model: nothing once they are gone, and nothing that counts in copies."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import BasisSearch, LayerInsertion, NeuronScaling
from growkernels.nn import BasisConv2d, convert, separate_attention
from growkernels.nn.grown_layers import Branch
from growkernels.nn.hooks import hooks_of

Driver = LayerInsertion | NeuronScaling
DRIVERS: list[Callable[[nn.Module], Driver]] = [
    lambda model: LayerInsertion(model),
    lambda model: NeuronScaling(model, kinds=["linear", "conv2d"]),
]
every_driver = pytest.mark.parametrize("build", DRIVERS)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 2),
    ).double()


def images() -> Tensor:
    return torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()


def count(model: nn.Module) -> int:
    of_modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )
    return of_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


@every_driver
@pytest.mark.parametrize("copied", [deep_copied, reloaded])
def test_copies_of_a_watched_model_are_free(
    build: Callable[[nn.Module], Driver], copied: Callable[[nn.Module], nn.Module]
) -> None:
    model = network()
    driver = build(model)
    with driver.recording():
        model(images()).square().sum().backward()
    best = copied(model)
    assert not any(hooks_of(module) for module in best.modules())
    convert(best, {"2": 2})
    assert isinstance(best.get_submodule("2"), BasisConv2d)
    assert count(best.get_submodule("2")) == 0
    BasisSearch(best, (0.25,), ["0"])
    again = build(copied(model))
    with again.recording():
        again.model(images()).square().sum().backward()


def test_left_overs_vanish_when_a_copy_runs() -> None:
    model = network()
    driver = LayerInsertion(model)
    best = copy.deepcopy(model).eval()
    assert count(best) == count(model) > 0
    with torch.no_grad():
        best(images())
    assert count(best) == 0
    torch.jit.script(best)
    assert count(model) > 0
    driver.close()
    assert count(model) == 0


@every_driver
def test_a_dropped_driver_leaves_nothing(build: Callable[[nn.Module], Driver]) -> None:
    model = network()
    for _ in range(20):
        driver = build(model)
        loss = F.cross_entropy(model(images()), torch.zeros(4, dtype=torch.long))
        with driver.recording():
            loss.backward()
        del driver
    gc.collect()
    assert count(model) == 0, "though the last loss is held"
    assert loss.isfinite()
    convert(model, {"2": 2})


@every_driver
def test_a_living_driver_is_named_where_it_is_in_the_way(
    build: Callable[[nn.Module], Driver],
) -> None:
    model = network()
    driver = build(model)
    with pytest.raises(ValueError, match=r"'0' cannot be converted\. A driver .* close\(\) first"):
        convert(model, {"0": 1})
    driver.close()
    convert(model, {"0": 1})


@every_driver
def test_a_closed_driver_puts_no_hook_on_a_changed_model(
    build: Callable[[nn.Module], Driver],
) -> None:
    model = network()
    driver = build(model)
    driver.close()
    model.insert(2, nn.Identity())
    assert (driver.positions if isinstance(driver, LayerInsertion) else driver.layers) is not None
    assert count(model) == 0


def test_hooks_of_the_user_still_count() -> None:
    model = network()
    driver = LayerInsertion(model)
    model[2].register_forward_hook(lambda *_: None)
    best = copy.deepcopy(model)
    with pytest.raises(ValueError, match="It carries hooks"):
        convert(best, {"2": 2})
    del driver
    with pytest.raises(ValueError, match="It carries hooks"):
        convert(model, {"2": 2})


def test_branches_in_copies_are_computed_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    scaling = NeuronScaling(model)
    with scaling.recording():
        model(torch.randn(8, 3)).square().sum().backward()
    scaling.grow(scaling.select(scaling.scores(), 12, 0))
    branches = [m for m in copy.deepcopy(model).modules() if isinstance(m, Branch)]
    assert branches
    assert all(branch.is_bare for branch in branches)
    assert not any(m.is_bare for m in model.modules() if isinstance(m, Branch))
    del scaling
    assert all(m.is_bare for m in model.modules() if isinstance(m, Branch))


def test_attention_of_a_copy_can_be_separated() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.mixing(x, x, x, need_weights=False)[0])
            return out

    model = Net()
    scaling = NeuronScaling(model, layers=["head.0"])
    inserter = LayerInsertion(model, {"head.1": "linear_relu", "mixing.out_proj": "residual"})
    best = copy.deepcopy(model)
    assert separate_attention(best).exchanged == ("mixing",)
    assert "hooks" in str(separate_skip(model))
    del inserter, scaling
    assert separate_attention(model).exchanged == ("mixing",)


def separate_skip(model: nn.Module) -> str:
    with pytest.raises(ValueError, match="left alone") as caught:
        separate_attention(model)
    return str(caught.value)


def test_a_search_while_drivers_watch() -> None:
    model = network()
    drivers = [build(model) for build in DRIVERS]
    search = BasisSearch(model, (0.25,))
    costs = search.sensitivities("train", train=lambda trained, _: float(trained(images()).mean()))
    assert set(costs.costs) == set(search.candidates)
    assert all(driver is not None for driver in drivers)
