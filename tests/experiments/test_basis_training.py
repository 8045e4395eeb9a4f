"""Basis-convolution study: trainings, schedules, plans and step times, in miniature."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_basis_study
import torch
from torch.nn import functional as F

from growkernels.experiments.basis.conclusion import BasisEvidence
from growkernels.experiments.basis.plans import (
    candidate_layers,
    make_plans,
    scaled_plan,
    scaled_times,
)
from growkernels.experiments.basis.search import Search, search_data
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    BY_TAYLOR,
    BY_TRAINING,
    DENSE,
    EVERYWHERE,
    FULL_FIRST,
    preset_settings,
)
from growkernels.experiments.basis.step_timing import StepTime, time_steps
from growkernels.experiments.basis.study import BasisStudy
from growkernels.experiments.basis.training import TRAINING_ORDER, BasisTraining
from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.images.store import ImageSource
from growkernels.experiments.images.synthetic_images import synthetic_images
from growkernels.experiments.models.resnet import resnet18
from growkernels.experiments.seeds import seeded
from growkernels.experiments.study import Result
from growkernels.experiments.table import Table
from growkernels.growth.basis_search import LayerTimes, Sensitivities, SkipSchedule
from growkernels.nn import BasisConv2d

SETTINGS = replace(tiny_basis_study.settings(), switch=0.5)
PLAN = {"layer1.0.conv1": 2, "layer3.1.conv2": 6, "layer4.0.conv1": 16}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return synthetic_images(24, 20, seeded(1), size=16)


def training(
    data: ImageData, plan: dict[str, int], order: str = "none", epochs: int = 4, run: int = 0
) -> BasisTraining:
    settings = replace(SETTINGS, epochs=epochs)
    schedule = SkipSchedule(order, 0 if order == "none" else epochs // 2)
    return BasisTraining(settings, data, "cpu", run, schedule, plan)


def trained(training: BasisTraining, until: int = 4) -> BasisTraining:
    for epoch in range(training.epoch, until):
        training.advance(epoch)
    return training


def stored(training: BasisTraining) -> Result:
    file = io.BytesIO()
    torch.save([training.measured, training.state()], file)
    file.seek(0)
    return Result(*torch.load(file, weights_only=True))


def numbers(training: BasisTraining, since: int = 0) -> dict[str, list[float]]:
    steps = training.measured["steps"]
    return {name: steps[name][since:] for name in ("loss", "test_loss", "accuracy")}


def converted(training: BasisTraining) -> set[str]:
    named = training.model.named_modules()
    return {path for path, module in named if isinstance(module, BasisConv2d)}


@pytest.mark.parametrize("order", ["none", BASIS_FIRST, FULL_FIRST])
def test_a_training_restored_after_every_epoch_ends_with_the_same_bits(
    order: str, data: ImageData
) -> None:
    whole = trained(training(data, PLAN, order))
    interrupted = training(data, PLAN, order)
    for epoch in range(4):
        interrupted.advance(epoch)
        state = stored(interrupted)
        interrupted = training(data, PLAN, order)
        interrupted.load(state, own=True)
    assert numbers(interrupted) == numbers(whole)


@pytest.mark.parametrize(("order", "origin_plan"), [(BASIS_FIRST, PLAN), (FULL_FIRST, {})])
def test_a_schedule_that_branches_off_is_the_whole_training(
    order: str, origin_plan: dict[str, int], data: ImageData
) -> None:
    origin = trained(training(data, origin_plan), until=2)
    branch = training(data, PLAN, order)
    branch.load(stored(origin), own=False)
    assert numbers(trained(branch)) == numbers(trained(training(data, PLAN, order)), since=2)


def test_schedules_change_over_in_the_middle(data: ImageData) -> None:
    forms = {}
    for order in ("none", BASIS_FIRST, FULL_FIRST):
        switching = training(data, PLAN, order, epochs=2)
        forms[order] = [converted(trained(switching, until)) for until in (1, 2)]
    assert forms["none"] == [set(PLAN)] * 2
    assert forms[BASIS_FIRST] == [set(PLAN), set()]
    assert forms[FULL_FIRST] == [set(), set(PLAN)]


def test_the_training_is_sgd_with_momentum_on_a_cosine(data: ImageData) -> None:
    """Against torch's scheduler and a loop of its own."""
    ours = training(data, {}, epochs=2)
    model = resnet18(10, width=8, generator=seeded(SETTINGS.seed, 0, 0))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * 3)
    for epoch in range(2):
        losses = []
        generator = seeded(SETTINGS.seed, 0, TRAINING_ORDER, epoch)
        draws = torch.randint(3, (2, 24), generator=generator)
        flips = torch.randint(2, (24,), generator=generator)
        order = torch.randperm(24, generator=generator)
        padded = F.pad(data.train_images, (1, 1, 1, 1))
        for index in order.split(8):
            crops = []
            for i in index.tolist():
                top, left = draws[:, i].tolist()
                image = padded[i, :, top : top + 16, left : left + 16]
                crops.append(image.flip(2) if flips[i] else image)
            images = ours.images.normalise(torch.stack(crops))
            loss = F.cross_entropy(model(images), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        ours.advance(epoch)
        assert ours.measured["steps"]["loss"][-1] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_runs_differ_and_variants_of_a_run_start_alike(data: ImageData) -> None:
    def stem(run: int, plan: dict[str, int]) -> torch.Tensor:
        return training(data, plan, run=run).model.conv1.weight

    assert torch.equal(stem(0, {}), stem(0, PLAN))
    assert not torch.equal(stem(0, {}), stem(1, {}))


def test_the_search_never_sees_the_test_images(data: ImageData) -> None:
    held = search_data(data, 5)
    assert (len(held.train_labels), len(held.test_labels)) == (19, 5)
    images = torch.cat([held.train_images, held.test_images]).flatten(1).float()
    distances = torch.cdist(images, data.train_images.flatten(1).float())
    assert sorted(distances.argmin(1).tolist()) == list(range(24))
    assert float(distances.min(1).values.max()) == 0
    assert len(search_data(data, 1000).test_labels) == 6


def times_of(saving: float) -> LayerTimes:
    """Every basis form saves this share of its layer's second; half the step is convolutions."""
    layers = candidate_layers(resnet18(10, width=8))
    ranks = {}
    for path in layers:
        half = 4 * 2 ** (int(path[5]) - 1)
        ranks[path] = {half // 2: 1 - saving, half: 1 - saving}
    return LayerTimes(step=2.0 * len(layers), full=dict.fromkeys(layers, 1.0), basis=ranks)


def sensitivities(method: str, ranks: int, cheap: str) -> Sensitivities:
    """Layers of stage ``cheap`` cost nothing."""
    layers = candidate_layers(resnet18(10, width=8))
    costs = {}
    for path in layers:
        half = 4 * 2 ** (int(path[5]) - 1)
        cost = 0.0 if path[5] == cheap else 1.0
        costs[path] = {half: cost} if ranks == 1 else {half // 2: 2 * cost, half: cost}
    return Sensitivities(method, costs, costs, baseline=1.0, seconds=10.0)


def test_plans_take_the_cheap_layers_until_the_time_is_saved() -> None:
    settings = replace(SETTINGS, kept_saving=0.25)
    model = resnet18(10, width=8)
    by_training, by_taylor = sensitivities("train", 1, "2"), sensitivities("taylor", 2, "3")
    ratio, plans = make_plans(settings, model, times_of(0.5), by_training, by_taylor)
    assert ratio == pytest.approx(1 - 0.25 * 0.25)
    assert len(plans[EVERYWHERE]) == 16
    assert plans[EVERYWHERE]["layer4.1.conv2"] == 32
    assert {path[:6] for path in plans[BY_TRAINING]} == {"layer2"}
    assert {path[:6] for path in plans[BY_TAYLOR]} == {"layer3"}
    assert len(plans[BY_TRAINING]) == 4


@pytest.mark.parametrize("saving", [-0.1, 5.0])  # 5: 2.5 times the step, measured under load
def test_where_no_time_is_saved_plans_save_parameters(saving: float) -> None:
    by_training, by_taylor = sensitivities("train", 1, "4"), sensitivities("taylor", 2, "4")
    ratio, plans = make_plans(
        SETTINGS, resnet18(10, width=8), times_of(saving), by_training, by_taylor
    )
    assert ratio is None
    assert {path[:6] for path in plans[BY_TRAINING]} == {"layer4"}


def test_plans_and_times_move_to_another_width() -> None:
    assert scaled_plan({"a": 2, "b": 1}, 8, 64) == {"a": 16, "b": 8}
    assert scaled_plan({"a": 2}, 64, 8) == {"a": 1}
    moved = scaled_times(LayerTimes(1.0, {"a": 1.0}, {"a": {16: 0.5, 32: 0.7}}), 64, 8)
    assert moved.basis == {"a": {2: 0.5, 4: 0.7}}


def test_step_times_are_relative_to_dense() -> None:
    plans = {DENSE: {}, EVERYWHERE: {"layer1.0.conv1": 4}}
    times = time_steps(plans, SETTINGS.timing, SETTINGS.recipe, 10, "cpu")
    assert set(times) == set(plans)
    assert times[DENSE].ratio == (1.0, 1.0, 1.0)
    low, middle, high = times[EVERYWHERE].ratio
    assert 0 < low <= middle <= high


def evidence(ratio: float) -> BasisEvidence:
    settings = replace(SETTINGS, fractions=(0.5,))
    by_training = sensitivities("train", 1, "2")
    by_taylor = replace(by_training, method="taylor", seconds=0.1)
    plans = {name: {} for name in (EVERYWHERE, BY_TRAINING, BY_TAYLOR)}
    search = Search(times_of(0.5), by_training, by_taylor, 0.2, 0.9, plans)
    step_times = {name: StepTime(10.0, (ratio, ratio, ratio)) for name in plans}
    step_times[DENSE] = StepTime(10.0, (1.0, 1.0, 1.0))
    source = ImageSource(Path("none"), {}, "cpu")
    return BasisEvidence(BasisStudy(settings, source, search, step_times), Table.of([{"epoch": 1}]))


def test_values_for_claims() -> None:
    saving = evidence(0.8).value("saving by_training", "")
    assert (saving.low, saving.high) == (pytest.approx(20), pytest.approx(20))
    assert "a step saves 20.0 % (quartiles 20.0 to 20.0, 10.0 % asked for)" in saving.measured
    cost = evidence(0.8).value("seconds of one core or GPU", "")
    assert cost.low == cost.high == pytest.approx(3.0)
    names = evidence(0.8).settings(["every fraction"])
    trained, predicted = evidence(0.8).vectors("costs of layers", names[0])
    assert trained == predicted


def test_a_schedules_time_is_the_mean_of_its_epochs() -> None:
    found = evidence(0.8)
    assert found.time_ratio(FULL_FIRST)[1] == pytest.approx(0.9)
    assert found.time_ratio(BASIS_FIRST)[1] == pytest.approx(0.9)
    assert found.epoch_seconds(FULL_FIRST) == pytest.approx(0.9 * 0.01 * 50_000 / 2)


def test_presets_have_their_sizes() -> None:
    paper = preset_settings("paper", synthetic=False, autocast=True)
    recipe = paper.recipe
    assert (recipe.width, recipe.batch, recipe.rate, recipe.weight_decay) == (64, 128, 0.1, 5e-4)
    assert recipe.autocast
    assert paper.train_images is None
    desk = preset_settings("desk", synthetic=False, autocast=False)
    assert desk.runs >= 10
    assert (desk.train_images, desk.test_images, desk.epochs) == (20_000, None, 10)


def test_autocast_trains_in_bfloat16(data: ImageData) -> None:
    settings = replace(SETTINGS, recipe=replace(SETTINGS.recipe, autocast=True))
    cast = BasisTraining(settings, data, "cpu", 0, SkipSchedule("none"), PLAN)
    seen: list[torch.dtype] = []
    handle = cast.model.layer4.register_forward_hook(
        lambda module, args, output: seen.append(args[0].dtype)
    )
    cast.advance(0)
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert cast.measured["steps"]["loss"][0] < 5
