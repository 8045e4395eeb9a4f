"""One batched training against the same networks trained alone with autograd and torch.optim."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from growkernels.experiments.models.batched import cross_entropy, initialise
from growkernels.experiments.models.networks import single_network
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli.engine import SettingRun, lineages_of, setting_data
from growkernels.experiments.sensli.merits import position_merits
from growkernels.experiments.sensli.settings import (
    SETTINGS,
    Insertion,
    Setting,
    Variant,
    preset_settings,
)
from growkernels.experiments.sensli.spirals_study import curve
from growkernels.nn import identity_layer

KIND = {"feedforward": "linear_relu", "residual": "residual"}


def tiny_setting(family: str, batch: int = 450) -> Setting:
    first = Insertion(4, "max", 0.5)
    return Setting(
        "tiny", "one or three insertions", family, width=4, hidden=2, batch=batch, rate=0.3,
        epochs=12, runs=3, script="test",
        variants=(
            Variant("small", 2),
            Variant("max", 2, (first,)),
            Variant("min", 2, (Insertion(4, "min", 0.5),)),
            Variant("max_2", 2, (first, Insertion(8, "max", 2.0))),
            Variant("scratch", 3),
        ),
    )  # fmt: skip


def run_to_end(setting: Setting, dtype: torch.dtype = torch.float64) -> SettingRun:
    run = SettingRun(setting, dtype=dtype)
    while not run.done:
        run.step()
    return run


def explicit_merits(network: nn.Sequential, family: str, width: int, x, y) -> list[float]:
    """Gradient norms of identity layers that are really inserted, one position at a time."""
    merits = []
    for position in range(len(network) - 1):
        new = identity_layer(KIND[family], width, dtype=x.dtype)
        extended = nn.Sequential(*network[: position + 1], new, *network[position + 1 :])
        extended.zero_grad()
        nn.functional.cross_entropy(extended(x), y).backward()
        weight = new.weight if family == "feedforward" else new.linear2.weight
        merits.append(weight.grad.square().sum().item())
    return merits


def train_alone(setting: Setting, variant: str, run: int) -> list[float]:
    """The variant's run with modules, autograd, torch.optim.SGD and explicit insertion."""
    spec = setting.variant(variant)
    start = initialise(
        setting.family, setting.runs, 2, setting.width, spec.start_hidden, 2,
        seeded(setting.seed, spec.start_hidden), torch.float64,
    )  # fmt: skip
    network = single_network(start, run)
    data = setting_data(setting, torch.float64)
    x, y = data.train_points, data.train_labels
    rate, curve, stopped = setting.rate, [], False
    for epoch in range(setting.epochs + 1):
        for insertion in spec.insertions:
            if insertion.epoch == epoch:
                merits = explicit_merits(network, setting.family, setting.width, x, y)
                best = max(merits) if insertion.rule == "max" else min(merits)
                at = merits.index(best)
                new = identity_layer(KIND[setting.family], setting.width, dtype=x.dtype)
                network = nn.Sequential(*network[: at + 1], new, *network[at + 1 :])
                rate *= insertion.rate_factor
        with torch.no_grad():
            curve.append(nn.functional.cross_entropy(network(x), y).item())
            predicted = network(data.test_points).argmax(1)
            stopped = stopped or bool((predicted == data.test_labels).all())
        if stopped:
            continue
        optimizer = torch.optim.SGD(network.parameters(), lr=rate)
        for batch in minibatches(setting, epoch, run):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return curve


def minibatches(setting: Setting, epoch: int, run: int) -> list[torch.Tensor]:
    if setting.full_batch:
        return [torch.arange(setting.train_samples)]
    draw = torch.rand(setting.runs, setting.train_samples, generator=seeded(setting.seed, epoch))
    return list(draw[run].argsort().split(setting.batch))


@pytest.mark.parametrize("family", ["feedforward", "residual"])
@pytest.mark.parametrize("batch", [450, 45])
@pytest.mark.parametrize("variant", ["small", "max", "min", "max_2", "scratch"])
def test_every_run_equals_the_network_trained_alone(family, batch, variant):
    setting = tiny_setting(family, batch)
    together = curve(run_to_end(setting), variant)
    for run in range(setting.runs):
        alone = torch.tensor(train_alone(setting, variant, run))
        torch.testing.assert_close(together[:, run], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["feedforward", "residual"])
def test_batched_merits_are_gradient_norms_of_inserted_layers(family):
    network = initialise(family, 5, 2, 4, 3, 2, torch.Generator().manual_seed(3), torch.float64)
    data = setting_data(tiny_setting(family), torch.float64)
    x, y = data.train_points, data.train_labels
    one_hot = torch.stack((y == 0, y == 1)).double()
    merits = position_merits(network, x.T[None], one_hot)
    assert merits.shape == (5, 3)
    for run in range(5):
        expected = explicit_merits(single_network(network, run), family, 4, x, y)
        torch.testing.assert_close(merits[run], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("family", ["feedforward", "residual"])
def test_insertion_keeps_every_function_and_lands_at_its_position(family):
    network = initialise(family, 4, 2, 3, 3, 2, torch.Generator().manual_seed(5))
    points = torch.randn(4, 2, 20, generator=torch.Generator().manual_seed(6))
    positions = torch.tensor([0, 1, 2, 1])
    grown = network.with_insertion(positions)
    assert torch.equal(grown.forward(points).logits, network.forward(points).logits)
    for run, position in enumerate(positions.tolist()):
        identity = torch.eye(3) if family == "feedforward" else 0.8 * torch.eye(3)
        assert torch.equal(grown.blocks[position][0][run], identity)
        assert torch.equal(grown.blocks[position][1][run], torch.zeros(3, 1))
        others = [b[0][run] for i, b in enumerate(grown.blocks) if i != position]
        for kept, old in zip(others, network.blocks, strict=True):
            assert torch.equal(kept, old[0][run])


def test_insertion_outside_the_network_is_refused():
    network = initialise("feedforward", 2, 2, 3, 2, 2, torch.Generator())
    for bad in ([0, 2], [-1, 0], [0]):
        with pytest.raises(ValueError, match="do not name one hidden layer"):
            network.with_insertion(torch.tensor(bad))


def test_initialisation_has_the_bounds_of_nn_linear():
    network = initialise("residual", 200, 2, 3, 3, 2, torch.Generator().manual_seed(0))
    for parameter, fan_in in zip(network.parameters(), (2, 2, 3, 3, 3, 3, 3, 3, 3, 3), strict=True):
        bound = fan_in**-0.5
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.97 * bound
        assert abs(parameter.mean()) < 0.05


def test_cross_entropy_and_backward_match_autograd():
    network = initialise("residual", 2, 2, 3, 2, 2, torch.Generator().manual_seed(1), torch.float64)
    points = torch.randn(2, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    one_hot = torch.stack((labels == 0, labels == 1)).double()
    activations = network.forward(points)
    loss, dlogits = cross_entropy(activations.logits, one_hot)
    gradients, _ = network.backward(activations, dlogits)
    for run in range(2):
        module = single_network(network, run)
        expected = nn.functional.cross_entropy(module(points[run].T), labels)
        expected.backward()
        torch.testing.assert_close(loss[run], expected.detach())
        for gradient, parameter in zip(gradients, module.parameters(), strict=True):
            torch.testing.assert_close(gradient[run].reshape(parameter.shape), parameter.grad)


def test_a_run_without_test_errors_is_frozen():
    run = SettingRun(replace(tiny_setting("feedforward"), runs=8))
    run.step()
    network = run.cohorts[2][1]
    logits = network.forward(run.points.expand(network.runs, -1, -1)).logits
    # Make the present answers of run 1 of the small net the right ones: no test error any more.
    run.test_labels = (logits[1, 1] > logits[1, 0])[run.train_count :]
    before = [p.clone() for p in network.parameters()]
    run.step()
    errors = run.error[1, run.rows(0)]
    assert errors[1] == 0
    other = int(errors.argmax())
    assert errors[other] > 0
    after = network.parameters()
    assert all(torch.equal(new[1], old[1]) for new, old in zip(after, before, strict=True))
    assert any(not torch.equal(n[other], o[other]) for n, o in zip(after, before, strict=True))


def test_variants_with_one_past_share_it():
    exp2 = next(s for s in SETTINGS if s.name == "exp2")
    assert lineages_of(exp2.variant("max")) == lineages_of(exp2.variant("random"))
    assert lineages_of(exp2.variant("large")) == lineages_of(exp2.variant("scratch_1"))
    exp7 = next(s for s in SETTINGS if s.name == "exp7")
    assert lineages_of(exp7.variant("max_3"))[:2] == lineages_of(exp7.variant("max"))
    assert exp7.variant("large").final_hidden == 6


def test_settings_are_those_of_the_paper():
    by_name = {s.name: s for s in SETTINGS}
    exp8 = by_name["exp8"]
    assert (exp8.width, exp8.hidden, exp8.batch, exp8.epochs, exp8.runs) == (10, 2, 45, 550, 30)
    assert by_name["exp4"].runs == 40
    assert [v.insertions[0].epoch for v in by_name["exp10"].variants if v.insertions] == list(
        range(150, 851, 100)
    )
    for name in ("exp2", "exp3", "exp6", "exp7"):
        setting = by_name[name]
        assert (setting.full_batch, setting.epochs, setting.runs) == (True, 1850, 30)
        assert setting.variant("max").insertions[0].epoch == 450


def test_presets_differ_in_the_number_of_initialisations() -> None:
    assert preset_settings("paper") == SETTINGS
    for preset, runs in (("quick", 12), ("desk", 300)):
        expected = tuple(replace(setting, runs=runs) for setting in SETTINGS)
        assert preset_settings(preset) == expected


@pytest.mark.parametrize("stop_at", [0, 3, 4, 9])
def test_state_restores_exactly(stop_at, tmp_path):
    setting = tiny_setting("residual", batch=100)
    whole = run_to_end(setting, torch.float32)
    first = SettingRun(setting)
    for _ in range(stop_at):
        first.step()
    torch.save(first.measured, tmp_path / "state.pt")
    second = SettingRun(setting)
    second.load(torch.load(tmp_path / "state.pt", weights_only=True))
    while not second.done:
        second.step()
    # Rows of lineages that do not live at an epoch are NaN there.
    assert torch.equal(second.loss.nan_to_num(-1), whole.loss.nan_to_num(-1))
    for index, (merits, positions, _) in whole.insertions.items():
        assert torch.equal(second.insertions[index][0], merits)
        assert torch.equal(second.insertions[index][1], positions)
