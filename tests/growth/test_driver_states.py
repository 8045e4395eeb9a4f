"""Recorded batches survive a kill: drivers' states, their sums, and batches that overflow."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_networks import batches, cnn, mlp, resnet
from torch import nn
from torch.nn import functional as F
from training import Batches, check_equal, record

from growkernels.growth import BasisSearch, LayerInsertion, NeuronScaling
from growkernels.growth.layer_insertion import sums_state
from growkernels.growth.neuron_scaling import samples_state

Driver = LayerInsertion | NeuronScaling


def insertion(model: nn.Module) -> LayerInsertion:
    return LayerInsertion(model)


def sampling(model: nn.Module) -> NeuronScaling:
    kinds = ("linear", "conv2d")
    generator = torch.Generator().manual_seed(3)
    return NeuronScaling(model, kinds=kinds, rows=16, generator=generator)


def keeping(model: nn.Module) -> NeuronScaling:
    """All rows, so that it does not matter which are drawn."""
    return NeuronScaling(model, kinds=("linear", "conv2d"))


def summing(model: nn.Module) -> NeuronScaling:
    return NeuronScaling(model, "gradient_sum", kinds=("linear", "conv2d"))


BUILDS: list[Callable[[nn.Module], Driver]] = [insertion, keeping, summing]


def saved(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def numbers(driver: Driver) -> dict[str, Any]:
    if isinstance(driver, LayerInsertion):
        merits = driver.merits()
        return {
            "values": merits.values,
            "snr": merits.snr,
            "base": merits.base,
            "n": merits.batches,
        }
    scores = driver.scores()
    return {"values": scores.values, "n": scores.batches}


@pytest.mark.parametrize("build", [insertion, sampling, summing])
@pytest.mark.parametrize("network", [mlp, cnn, resnet])
def test_recording_goes_on_with_the_same_bits(
    network: Callable[[], nn.Module], build: Callable[[nn.Module], Driver]
) -> None:
    model = network()
    data = batches(model, 3, 8)
    driver = build(model)
    record(driver, data[:2])
    state = saved(driver.state_dict())
    record(driver, data[2:])
    twin = network()
    resumed = build(twin)
    record(resumed, data[:1])  # forgotten
    resumed.load_state_dict(state)
    again = saved(resumed.state_dict())
    check_equal(again, state)
    record(resumed, data[2:])
    check_equal(numbers(resumed), numbers(driver))


@pytest.mark.parametrize("build", BUILDS)
def test_states_of_several_processes_add_up(build: Callable[[nn.Module], Driver]) -> None:
    data = batches(mlp(), 5, 3)
    alone = build(mlp())
    record(alone, data)
    states = []
    for part in (data[:2], data[2:]):
        driver = build(mlp())
        record(driver, part)
        states.append(saved(driver.state_dict()))
    nothing = sums_state.nothing_of if build is insertion else samples_state.nothing_of
    resumed = build(mlp())
    resumed.load_state_dict([*states, nothing(states[0])])
    torch.testing.assert_close(numbers(resumed), numbers(alone))
    # One that has nothing of its own can take part in the sums of all.
    resumed.load_state_dict(nothing(states[0]))
    record(resumed, data)
    torch.testing.assert_close(numbers(resumed), numbers(alone))


def under_a_scaler(driver: Driver, data: Batches, overflow: int | None) -> None:
    for number, (x, y) in enumerate(data):
        with driver.recording(loss_scale=1024.0):
            loss = 1024.0 * F.cross_entropy(driver.model(x), y)
            (loss * math.inf if number == overflow else loss).backward()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("overflow", [0, 2, 3])
def test_a_batch_that_overflows_does_not_count(
    build: Callable[[nn.Module], Driver], overflow: int
) -> None:
    model = mlp()
    data = list(batches(model, 4, 4))
    driver = build(model)
    under_a_scaler(driver, data, overflow)
    expected = build(mlp())
    under_a_scaler(expected, [b for n, b in enumerate(data) if n != overflow], None)
    torch.testing.assert_close(numbers(driver), numbers(expected))
    if isinstance(driver, LayerInsertion):
        merits = driver.merits()
        assert merits.overflowed == 1
        assert driver.select(merits) is not None
        assert "(1 batches overflowed under their loss scale and were left out)" in driver.reason
    else:
        scores = driver.scores()
        assert scores.overflowed == 1
        assert "1 batches overflowed" in str(scores)
    driver.reset()
    under_a_scaler(driver, data[:1], 0)
    with pytest.raises(RuntimeError, match=r"No batches are recorded \(1 batches overflowed"):
        numbers(driver)


def test_states_of_others_are_refused() -> None:
    model = mlp()
    inserter, scaling = insertion(model), summing(model)
    record(inserter, batches(model, 1, 4))
    record(scaling, batches(model, 1, 4))
    of_inserter, of_scaling = inserter.state_dict(), scaling.state_dict()
    with pytest.raises(
        ValueError, match="The state is of a NeuronScaling, not of a LayerInsertion"
    ):
        inserter.load_state_dict(of_scaling)
    with pytest.raises(
        ValueError, match="The state is of a LayerInsertion, not of a NeuronScaling"
    ):
        scaling.load_state_dict(of_inserter)
    with pytest.raises(
        ValueError, match="recorded for criterion 'gradient_sum', and this driver's"
    ):
        sampling(model).load_state_dict(of_scaling)
    with pytest.raises(ValueError, match="of other positions, for instance '3'"):
        LayerInsertion(mlp(), ["1"]).load_state_dict(of_inserter)
    wider = summing(mlp(width=7))
    with pytest.raises(ValueError, match="layer '2' of another width"):
        wider.load_state_dict(of_scaling)
    other = NeuronScaling(mlp(), "gradient_sum", layers=["2"])
    with pytest.raises(ValueError, match="layer '0', which is no candidate here"):
        other.load_state_dict(of_scaling)


def test_a_search_goes_on_with_its_candidates() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    search = BasisSearch(model, fractions=(0.25,), layers=["2"])
    state = saved(search.state_dict())
    other = BasisSearch(model)
    assert other.candidates != search.candidates
    other.load_state_dict(state)
    assert other.candidates == search.candidates
    with pytest.raises(ValueError, match="not of a BasisSearch"):
        other.load_state_dict({"driver": "NeuronScaling"})
    smaller = BasisSearch(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 3, 3)))
    with pytest.raises(ValueError, match="The state searches '2' with up to 4 basis filters"):
        smaller.load_state_dict(state)
