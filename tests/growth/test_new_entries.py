"""What new entries of widened parameters do in their first steps, warmed up or not, and the log."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_networks import mlp, recorded
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import Monitor, NeuronScaling, WarmUp
from growkernels.nn.new_entries import NewSince

ADAM_LIKE: dict[str, dict[str, Any]] = {
    "Adam": {},
    "AdamW": {"amsgrad": True, "weight_decay": 0.0},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "RMSprop": {"centered": False},
    "Adadelta": {"lr": 1.0},
    "Adagrad": {},
    "Rprop": {},
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def widen(model: nn.Module, optimizer: torch.optim.Optimizer | None, budget: int = 12) -> None:
    scaling = NeuronScaling(model, "magnitude", widen=("fc1",), depth=False)
    scaling.grow(scaling.select(scaling.scores(), budget=budget, min_eligible=1), optimizer)
    scaling.close()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """One with all gradients 0.3; how it changed the parameters."""
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


@pytest.mark.parametrize("name", ADAM_LIKE)
def test_first_steps_are_no_larger_than_those_of_old_entries(name: str) -> None:
    """A mean of 0 would make Adam's 3.2 times as large at the first, 6.5 at the tenth."""
    model = network()
    options = {"lr": 1e-3, **ADAM_LIKE[name]}
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)
    for _ in range(300):
        step(model, optimizer)
    since = NewSince(model)
    widen(model, optimizer)
    ratios: list[float] = []
    for _ in range(100):
        changes = step(model, optimizer)
        for parameter, change in zip(model.parameters(), changes, strict=True):
            mask = since.mask(parameter)
            if mask is not None:
                old = float(change[~mask].abs().mean())
                ratios.append(float(change[mask].abs().max()) / old)
    assert max(ratios) <= 1.001
    assert ratios[-1] >= 0.2
    assert min(ratios) > 0.05


def test_steps_in_training_stay_within_the_learning_rate() -> None:
    """With the gradients that there are; with means of 0 some would be larger."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(200, 16, 3, generator=torch.Generator().manual_seed(2)).double()

    def train(batch: Tensor) -> None:
        optimizer.zero_grad()
        (model(batch) - batch[:, :2].sin()).square().mean().backward()
        optimizer.step()

    for batch in x[:100]:
        train(batch)
    since = NewSince(model)
    widen(model, optimizer)
    new = [(p, since.mask(p)) for p in model.parameters()]
    for batch in x[100:]:
        before = [p.detach().clone() for p, _ in new]
        train(batch)
        for (parameter, mask), old in zip(new, before, strict=True):
            if mask is not None:
                assert float((parameter.detach() - old)[mask].abs().max()) <= 1e-3


def test_the_factors_without_it_that_the_docstring_names() -> None:
    b1, b2, t = 0.9, 0.999, 10**6
    for s, factor in ((1, 3.2), (10, 6.5), (1000, 1.3)):
        moment, square = (1 - b1**s) / (1 - b1**t), (1 - b2**s) / (1 - b2**t)
        assert moment / square**0.5 == pytest.approx(factor, abs=0.06)


def test_momentum_of_sgd_starts_at_zero() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step(model, optimizer)
    since = NewSince(model)
    widen(model, optimizer)
    for parameter in model.parameters():
        mask = since.mask(parameter)
        if mask is not None:
            buffer = optimizer.state[parameter]["momentum_buffer"]
            assert not buffer[mask].any()
            assert buffer[~mask].all()


def test_masks_follow_entries_through_several_growths() -> None:
    model = network()
    first = NewSince(model)
    widen(model, None)
    second = NewSince(model)
    widen(model, None)
    weight = model[0].weight
    news = []
    for since, count in ((first, weight.shape[0] - 4), (second, 2)):
        mask = since.mask(weight)
        assert mask is not None
        news.append(mask)
        assert int(mask.sum()) == 3 * count
    assert bool(news[0][news[1]].all())
    assert NewSince(model).mask(weight) is None
    model.append(nn.Linear(2, 2).double())
    whole = second.mask(model[-1].weight)
    assert whole is not None
    assert bool(whole.all())


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_warm_up_scales_the_updates_of_new_entries_alone(kind: str) -> None:
    models = [network()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [getattr(torch.optim, kind)(m.parameters(), lr=0.01) for m in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    since = NewSince(models[0])
    warm_up = WarmUp(models[0], optimizers[0], steps=4)
    step(models[0], optimizers[0])
    step(models[1], optimizers[1])
    assert warm_up.done == 0
    for model, optimizer in zip(models, optimizers, strict=True):
        widen(model, optimizer)
    for number in range(1, 7):
        warmed, plain = (step(m, o) for m, o in zip(models, optimizers, strict=True))
        for parameter, a, b in zip(models[0].parameters(), warmed, plain, strict=True):
            mask = since.mask(parameter)
            factor = torch.ones_like(a)
            if mask is not None:
                factor[mask] = min(1.0, number / 4)
            if kind == "SGD" or mask is None:  # weight decay sees other values
                torch.testing.assert_close(a, factor * b)
            else:
                torch.testing.assert_close(a, factor * b, rtol=0.02, atol=1e-6)
    assert warm_up.done == 4
    assert not optimizers[0]._optimizer_step_pre_hooks


def test_a_monitor_tells_new_from_old() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    monitor = Monitor(model, optimizer)
    step(model, optimizer)
    assert monitor.values["parameters/new"] == 0
    assert monitor.values["gradient_norm/old"] == pytest.approx(0.3 * 26**0.5)
    widen(model, optimizer)
    scaling = NeuronScaling(model, "magnitude")
    monitor.note(scaling.scores())
    since = 6 * 2  # two neurons of 3 weights, a bias and two columns
    step(model, optimizer)
    values = monitor.values
    assert all(type(value) is float for value in values.values())
    assert values["parameters/new"] == since
    assert values["parameters/old"] == 26
    assert values["gradient_norm/new"] == pytest.approx(0.3 * since**0.5)
    assert values["update_rms/new"] == pytest.approx(0.15)
    assert values["update_norm/old"] == pytest.approx(0.15 * 26**0.5)
    assert values["width/0"] == 6
    assert "width/2" not in values
    assert values["score/0"] == pytest.approx(
        -float(model[0].weight.detach().norm(dim=1).max()), rel=0.3
    )
    assert values["eligible/0"] == 6
    assert [entry["step"] for entry in monitor.history] == [1, 2]
    monitor.close()
    step(model, optimizer)
    assert len(monitor.history) == 2


def test_a_monitor_notes_merits_and_eigenvalues() -> None:
    model = mlp()
    monitor = Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=2)
    inserter = recorded(model)
    noted = monitor.note(inserter.merits())
    inserter.close()
    assert set(noted) == {"merit/1", "merit/3"}
    scaling = NeuronScaling(model)
    with scaling.recording():
        F.cross_entropy(model(torch.ones(5, 2).double()), torch.arange(5) % 2).backward()
    assert "eigenvalue/0" in monitor.note(scaling.scores())
    with pytest.raises(TypeError, match="note\\(\\) was given a int"):
        monitor.note(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every is 0"):
        Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), every=0)
