"""Drivers follow modules across changes that others make, or say that the model was changed."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from small_networks import batches, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import LinearReLU, convert
from growkernels.nn.module_paths import ModulePaths, Plan


def deep(width: int = 4) -> nn.Sequential:
    """Layers of one width, so that nothing but identity tells them apart."""
    torch.manual_seed(0)
    layers = [nn.Linear(width, width) for _ in range(5)]
    return nn.Sequential(
        layers[0], nn.ReLU(), layers[1], layers[2], layers[3], nn.ReLU(), layers[4]
    ).double()


def data(seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator, dtype=torch.float64)


def record(model: nn.Module, *drivers: LayerInsertion | NeuronScaling) -> None:
    for driver in drivers:
        with driver.recording():
            model(data()).square().sum().backward()


CRITERIA = ["splitting", "gradient_sum", "magnitude"]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("order", ["scores", "select", "grow"])
def test_scaling_follows_its_layer_when_another_driver_renumbers(
    criterion: str, order: str
) -> None:
    model = deep()
    layer = model[4]
    scaling = NeuronScaling(model, criterion, layers=["4"])
    inserter = LayerInsertion(model)
    record(model, scaling, inserter)
    expected = scaling.scores()
    chosen = scaling.select(expected, budget=60, min_eligible=0)
    inserter.insert("1")
    assert model[5] is layer
    assert scaling.layers == ("5",)
    if order == "scores":
        found = scaling.scores()
        torch.testing.assert_close(found.values["5"], expected.values["4"])
        chosen = scaling.select(found, budget=60, min_eligible=0)
    elif order == "select":
        chosen = scaling.select(expected, budget=60, min_eligible=0)
    outputs = next(iter(chosen.neurons.values()))
    scaling.grow(chosen, sample=data())
    assert insertions(model)[-1]["depth"] == {"5": list(outputs)}
    assert [name for name, _ in model.named_modules() if name.endswith("branches")] == [
        "5.branches"
    ]
    assert model[5] is layer
    assert scaling.layers[0] == "5"


def test_scores_of_the_former_path_are_not_taken_for_another_layer() -> None:
    """The same as above with numbers: the layer that is at the old path now is not the one."""
    model = deep()
    reference = copy.deepcopy(model)
    scaling, inserter = NeuronScaling(model, layers=["4"]), LayerInsertion(model)
    record(model, scaling, inserter)
    inserter.insert("1")
    alone = NeuronScaling(reference, layers=["4"])
    record(reference, alone)
    (name,) = scaling.scores().values
    weight = model.get_submodule(name).weight
    assert torch.equal(weight, reference.get_submodule("4").weight)  # type: ignore[arg-type]
    assert isinstance(weight, Tensor)
    torch.testing.assert_close(scaling.scores().values[name], alone.scores().values["4"])


def test_insertion_follows_its_positions_when_another_driver_renumbers() -> None:
    model = mlp()
    first, second = LayerInsertion(model), LayerInsertion(model)
    for x, y in batches(model, 2, 8):
        for driver in (first, second):
            with driver.recording():
                F.cross_entropy(model(x), y).backward()
    before = second.merits()
    relu = model[3]
    first.insert("1")
    with pytest.raises(RuntimeError, match="'3' is not the one that was recorded"):
        second.insert("3")
    after = second.merits()
    assert after.names == ("1", "4")
    assert torch.equal(after.values, before.values)
    assert [position.name for position in second.positions] == ["1", "4"]
    assert second.select(before) == after.names[int(before.values.argmax())]
    new = second.insert("4", sample=batches(model, 1, 8)[0][0])
    assert model[4] is relu
    assert model[5] is new


def test_growth_before_an_insertion_is_followed_too() -> None:
    """A grown layer stays the same module."""
    model = deep()
    kept = model[0]
    scaling, inserter = NeuronScaling(model, layers=["0"]), LayerInsertion(model)
    record(model, scaling, inserter)
    merits = inserter.merits()
    scaling.grow(scaling.select(scaling.scores(), 60, 0), sample=data())
    assert model[0] is kept
    assert torch.equal(inserter.merits().values, merits.values)
    inserter.insert("5", sample=data())
    other = NeuronScaling(model, "magnitude")
    assert "0.branches.0.linear" in other.layers


def test_two_scalings_of_one_layer() -> None:
    model = deep()
    one, other = NeuronScaling(model, layers=["2"]), NeuronScaling(model, layers=["2", "4"])
    record(model, one, other)
    before = other.scores()
    one.grow(one.select(one.scores(), 60, 0), sample=data())
    after = other.scores()
    assert set(after.values) == {"2", "4"}, "its branches were not recorded"
    for name, values in before.values.items():
        torch.testing.assert_close(after.values[name], values)
    other.grow(other.select(before, 60, 0), sample=data())


def test_what_was_widened_is_not_what_was_recorded() -> None:
    model = deep()
    scaling = NeuronScaling(model, "magnitude", layers=["4"], widen=["fc1"], depth=False)
    wide, inserter = NeuronScaling(model, layers=["4", "6"]), LayerInsertion(model)
    record(model, wide, inserter)
    stale = wide.select(wide.scores(), 60, 0)
    scaling.grow(scaling.select(scaling.scores(), 60, 1), sample=data())
    changed = r"model was changed since its batches were recorded: the weight of '4' was \[4, 4\]"
    for use in (
        wide.scores,
        inserter.merits,
        lambda: inserter.insert("5"),
        lambda: wide.grow(stale),
    ):
        with pytest.raises(RuntimeError, match=changed):
            use()
    for driver in (wide, inserter):
        driver.reset()
        record(model, driver)
    inserter.insert("5", sample=data())
    with pytest.raises(ValueError, match=r"layer '[46]' as it was: the model was changed"):
        wide.grow(stale)


@pytest.mark.parametrize("index", [1, 4, 5])
def test_a_module_that_a_user_replaced(index: int) -> None:
    model = deep()
    scaling, inserter = NeuronScaling(model, layers=["4"]), LayerInsertion(model)
    record(model, scaling, inserter)
    chosen = scaling.select(scaling.scores(), 60, 0)
    model[index] = copy.deepcopy(model[index])
    paths = list(model.state_dict())
    match = f"was changed since its batches were recorded: the module that was at '{index}'"
    for use in (
        scaling.scores,
        lambda: scaling.grow(chosen),
        inserter.merits,
        lambda: inserter.insert("1"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=match):
            use()
    for driver in (scaling, inserter):
        with pytest.raises(RuntimeError, match=match), driver.recording():
            model(data()).sum().backward()
    assert list(model.state_dict()) == paths
    assert insertions(model) == []


def test_a_replaced_layer_that_was_named_or_is_found_anew() -> None:
    model = deep()
    named, scaling = NeuronScaling(model, layers=["4"]), NeuronScaling(model)
    inserter, at = LayerInsertion(model), LayerInsertion(model, ["5"])
    model[4], model[5] = nn.Linear(4, 4).double(), nn.ReLU()
    with pytest.raises(RuntimeError, match="layers= named is not in the model any more"):
        named.scores()
    with pytest.raises(RuntimeError, match="'5' is not in the model any more"), at.recording():
        model(data()).sum().backward()
    record(model, scaling, inserter)
    assert scaling.scores().values.keys() == {"0", "2", "3", "4"}
    inserter.insert("5", sample=data())


def test_layers_that_trade_places_are_followed() -> None:
    model = deep()
    scaling = NeuronScaling(model)
    record(model, scaling)
    before = scaling.scores().values
    model[2], model[4] = model[4], model[2]
    after = scaling.scores().values
    for old, new in (("2", "4"), ("4", "2"), ("0", "0"), ("3", "3")):
        torch.testing.assert_close(after[new], before[old])


def test_an_exchange_between_record_and_growth() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 2)
    ).double()
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    scaling, inserter = NeuronScaling(model), LayerInsertion(model, kinds=["linear_relu"])
    for driver in (scaling, inserter):
        with driver.recording():
            model(x).square().sum().backward()
    convert(model, {"0": 2})
    for use in (scaling.scores, inserter.merits):
        with pytest.raises(RuntimeError, match="the module that was at '0' is not in the model"):
            use()
    for driver in (scaling, inserter):
        driver.reset()
        with driver.recording():
            model(x).square().sum().backward()
    inserter.insert("4", sample=x)


def test_something_added_before_the_first_batch_is_no_obstacle() -> None:
    """A forward pass from before the addition still counts."""
    model = deep()
    scaling, inserter = NeuronScaling(model), LayerInsertion(model)
    model.append(nn.Linear(4, 4).double())
    assert "6" in scaling.layers, "it is not the last linear layer any more"
    loss = model(data()).square().sum()
    model.add_module("unused", nn.Identity())
    for driver in (scaling, inserter):
        with driver.recording():
            loss.backward(retain_graph=True)
    assert "6" in scaling.scores().values
    inserter.insert("1")


def test_parameters_that_were_exchanged_for_others() -> None:
    """As load_state_dict(assign=True) does; the gradients are those of the new ones."""
    model = deep()
    drivers = LayerInsertion(model), NeuronScaling(model, "gradient_sum")
    record(model, *drivers)
    for driver in drivers:
        driver.reset()
    other = deep()
    model.load_state_dict({k: 2 * v for k, v in other.state_dict().items()}, assign=True)
    other.load_state_dict(model.state_dict())
    plain = LayerInsertion(other), NeuronScaling(other, "gradient_sum")
    record(model, *drivers)
    record(other, *plain)
    assert drivers[0].merits().base == plain[0].merits().base > 0
    for name, values in plain[1].scores().values.items():
        assert torch.equal(drivers[1].scores().values[name], values)


def test_records_of_followed_layers_rebuild_the_network() -> None:
    model, base = deep(), deep()
    scaling, inserter = NeuronScaling(model, layers=["4"]), LayerInsertion(model)
    record(model, scaling, inserter)
    chosen = scaling.select(scaling.scores(), 60, 0)
    inserter.insert("1")
    scaling.grow(chosen)
    rebuild(base, insertions(model))
    base.load_state_dict(model.state_dict())
    assert torch.equal(base(data()), model(data()))


def test_layers_added_by_hand_between_two_growths_are_said() -> None:
    """Records number layers: what came in between is in none of them."""
    model = nn.Sequential(deep(), nn.Linear(4, 2).double())
    inserter = LayerInsertion(model, positions=["0.1"])
    record(model, inserter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inserter.insert("0.1")
        convert(model, {})
        model[1] = nn.Linear(4, 3).double()  # another head is nothing that records number
        record(model, inserter)
        inserter.insert("0.1")
    model[0].insert(0, nn.Linear(4, 4).double())
    record(model, inserter)
    with pytest.warns(UserWarning, match="'0' had 9 children .* has 10 now: others changed"):
        inserter.insert("0.2")


def test_inside_an_attribute_the_old_module_moves_down() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc2(self.act(self.fc1(x)))
            return out

    torch.manual_seed(0)
    model = Net().double()
    first, second = LayerInsertion(model, ["act"]), LayerInsertion(model, ["act"])
    record(model, first, second)
    first.insert("act", sample=data())
    assert second.merits().names == ("act.0",)
    new = second.insert("act.0", sample=data())
    assert isinstance(new, LinearReLU)
    assert model.get_submodule("act.1") is new


def test_results_that_left_the_process_are_taken_by_their_paths() -> None:
    model = deep()
    scaling = NeuronScaling(model)
    record(model, scaling)
    scores = scaling.scores()
    for copied in (pickle.loads(pickle.dumps(scores)), copy.deepcopy(scores)):
        chosen = scaling.select(copied, 60, 0)
        assert chosen.neurons == scaling.select(scores, 60, 0).neurons
    plan = Plan({"4": 2}).noted(ModulePaths(model))
    assert pickle.loads(pickle.dumps(plan)) == plan == {"4": 2}
    assert pickle.loads(pickle.dumps(plan)).path_now(model, "9") == "9"


def test_a_layout_keeps_no_module_alive_and_knows_shared_ones() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    paths = ModulePaths(model)
    assert paths.is_current(model)
    assert paths.now(model) == {"": "", "0": "0", "1": "1", "2": "2"}
    del model[0]
    assert not paths.is_current(model)
    assert paths.now(model) == {"": "", "0": "1", "1": "0", "2": "1"}
    assert paths.difference(model) is None
    model[0] = nn.Tanh()
    assert paths.module("1") is None
    assert paths.path_now(model, "1") is None
    assert paths.difference(model) == "the module that was at '1' is not in the model any more"
    assert ModulePaths().path_now(model, "7") == "7"
