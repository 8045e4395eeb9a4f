"""FLOPs against torch's counter, and the authors' merit pass against ours."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import growkernels as gk
from growkernels.experiments.models.batched import initialise
from growkernels.experiments.models.networks import fully_connected, single_network
from growkernels.experiments.sensli import flops, merit_timing
from growkernels.experiments.sensli.authors_merits import ExtendedNetwork
from growkernels.experiments.sensli.merits import position_merits
from growkernels.experiments.sensli.settings import SETTINGS

BY_NAME = {setting.name: setting for setting in SETTINGS}


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["feedforward", "residual"])
@pytest.mark.parametrize("hidden", [1, 2, 4])
def test_pass_flops_are_what_torch_counts(family, hidden):
    network = fully_connected(family, 2, 5, hidden, 2)
    x, y = torch.randn(90, 2), torch.randint(2, (90,))
    total = counted(lambda: F.cross_entropy(network(x), y).backward())
    assert total == flops.pass_flops(family, 5, hidden, 90)


@pytest.mark.parametrize("name", ["exp3", "exp6"])
def test_merit_flops_are_what_torch_counts(name):
    setting = BY_NAME[name]
    kind = merit_timing.KIND_OF_FAMILY[setting.family]
    model = fully_connected(setting.family, 2, setting.width, setting.hidden, 2)
    x, y = torch.randn(450, 2), torch.randint(2, (450,))
    paths = {str(i): setting.width for i in range(setting.hidden)}
    extended = ExtendedNetwork(model, paths, kind)
    authors = counted(lambda: extended.merits([(x, y)], F.cross_entropy))
    assert authors == flops.authors_merit_flops(setting)
    h = [torch.randn(450, setting.width) for _ in paths]
    ours = counted(lambda: gk.virtual_grad_norms(h, h, kind))
    assert ours == flops.virtual_flops(setting)


def test_training_flops_add_up_the_phases():
    setting = BY_NAME["exp6"]
    small = flops.pass_flops("feedforward", 4, 2, 450)
    large = flops.pass_flops("feedforward", 4, 3, 450)
    assert flops.training_flops(setting, setting.variant("max")) == 450 * small + 1400 * large
    assert flops.training_flops(setting, setting.variant("scratch_1")) == 1850 * large


@pytest.mark.parametrize("family", ["feedforward", "residual"])
def test_the_authors_pass_the_driver_and_the_batched_op_agree(family):
    networks = initialise(family, 3, 2, 4, 3, 2, torch.Generator().manual_seed(0), torch.float64)
    x = torch.randn(60, 2, dtype=torch.float64)
    y = torch.randint(2, (60,))
    one_hot = torch.stack((y == 0, y == 1)).double()
    batched = position_merits(networks, x.T[None], one_hot)
    kind = merit_timing.KIND_OF_FAMILY[family]
    batches = list(zip(x.split(20), y.split(20), strict=True))
    for run in range(3):
        model = single_network(networks, run)
        paths = {str(i): 4 for i in range(3)}
        authors = ExtendedNetwork(model, paths, kind).merits(batches, F.cross_entropy)
        inserter = gk.growth.LayerInsertion(model, dict.fromkeys(paths, kind), scale=0.8)
        driver = merit_timing.driver_merits(inserter, model, batches)
        # The extended network is built in float32, where 0.8 is off by 1e-8.
        assert authors == pytest.approx(batched[run].tolist(), rel=1e-6)
        assert driver == pytest.approx(batched[run].tolist(), rel=1e-9)


def test_the_authors_pass_handles_convolutions_and_leaves_the_model_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 3),
    )  # fmt: skip
    x, y = torch.randn(6, 3, 8, 8), torch.randint(3, (6,))
    before = model(x)
    extended = ExtendedNetwork(model, {"1": 4, "4": 5}, "conv2d_relu")
    torch.testing.assert_close(extended.model(x), before)
    merits = extended.merits(zip(x.split(3), y.split(3), strict=True), F.cross_entropy)
    inserter = gk.growth.LayerInsertion(model)
    for inputs, targets in zip(x.split(3), y.split(3), strict=True):
        with inserter.recording():
            F.cross_entropy(model(inputs), targets).backward()
    assert merits == pytest.approx(inserter.merits().values.tolist(), rel=1e-4)
    assert len(model) == 7


def test_the_authors_pass_refuses_an_unknown_kind():
    with pytest.raises(ValueError, match="Unknown kind 'pool'"):
        ExtendedNetwork(nn.Sequential(nn.Linear(3, 3)), {"0": 3}, "pool")
