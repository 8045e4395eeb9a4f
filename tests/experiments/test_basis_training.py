"""Basis-convolution study: trainings, schedules, plans, step times and verdicts, in miniature."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import tiny_basis_study
import torch
from torch.nn import functional as F

from growkernels.data.images import ImageData
from growkernels.data.synthetic_images import synthetic_images
from growkernels.experiments.basis.brief_training import search_data
from growkernels.experiments.basis.claims import basis_claims
from growkernels.experiments.basis.plans import (
    candidate_layers,
    make_plans,
    scaled_plan,
    scaled_times,
)
from growkernels.experiments.basis.results import Study
from growkernels.experiments.basis.search import Search
from growkernels.experiments.basis.settings import (
    BASIS_FIRST,
    BY_TAYLOR,
    BY_TRAINING,
    DENSE,
    EVERYWHERE,
    FULL_FIRST,
    VARIANTS,
    preset_settings,
)
from growkernels.experiments.basis.step_timing import StepTime, time_steps
from growkernels.experiments.basis.training import TRAINING_ORDER, Curves, Task, Training
from growkernels.experiments.seeds import seeded
from growkernels.growth.basis_search import LayerTimes, Sensitivities
from growkernels.models.resnet import resnet18
from growkernels.nn import BasisConv2d

SETTINGS = replace(tiny_basis_study.settings(), switch=0.5)
PLAN = {"layer1.0.conv1": 2, "layer3.1.conv2": 6, "layer4.0.conv1": 16}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return synthetic_images(24, 20, seeded(1), size=16)


def trained(task: Task, data: ImageData) -> Training:
    training = Training(task, SETTINGS, data)
    while not training.done:
        training.step()
    return training


def measured(training: Training) -> tuple[list[float], list[float], list[float]]:
    curves = training.curves
    return curves.loss, curves.test_loss, curves.accuracy


def converted(training: Training) -> set[str]:
    named = training.model.named_modules()
    return {path for path, module in named if isinstance(module, BasisConv2d)}


@pytest.mark.parametrize("order", ["none", BASIS_FIRST, FULL_FIRST])
def test_a_training_restored_after_every_epoch_ends_with_the_same_bits(
    order: str, data: ImageData
) -> None:
    task = Task("t", 0, 4, PLAN, order)
    whole, interrupted = trained(task, data), Training(task, SETTINGS, data)
    while not interrupted.done:
        interrupted.step()
        file = io.BytesIO()
        torch.save(interrupted.state_dict(), file)
        file.seek(0)
        interrupted = Training(task, SETTINGS, data)
        interrupted.load_state_dict(torch.load(file, weights_only=True))
    assert measured(interrupted) == measured(whole)


@pytest.mark.parametrize(("order", "origin_plan"), [(BASIS_FIRST, PLAN), (FULL_FIRST, {})])
def test_a_schedule_that_branches_off_is_the_whole_training(
    order: str, origin_plan: dict[str, int], data: ImageData
) -> None:
    origin = Training(Task("origin", 0, 4, origin_plan), SETTINGS, data)
    for _ in range(origin.switch_epoch):
        origin.step()
    branch = Training(Task("branch", 0, 4, PLAN, order, branch_of="origin"), SETTINGS, data)
    branch.load_state_dict(origin.state_dict())
    while not branch.done:
        branch.step()
    assert measured(branch) == measured(trained(Task("whole", 0, 4, PLAN, order), data))


def test_schedules_change_over_in_the_middle(data: ImageData) -> None:
    trainings = {o: Training(Task(o, 0, 2, PLAN, o), SETTINGS, data) for o in (
        "none", BASIS_FIRST, FULL_FIRST)}  # fmt: skip
    forms = {order: [] for order in trainings}
    for order, training in trainings.items():
        while not training.done:
            training.step()
            forms[order].append(converted(training))
    assert forms["none"] == [set(PLAN)] * 2
    assert forms[BASIS_FIRST] == [set(PLAN), set()]
    assert forms[FULL_FIRST] == [set(), set(PLAN)]


def test_the_training_is_sgd_with_momentum_on_a_cosine(data: ImageData) -> None:
    """Against torch's scheduler and a loop of its own."""
    training = Training(Task("t", 0, 2), SETTINGS, data)
    model = resnet18(10, width=4, generator=seeded(SETTINGS.seed, 0, 0))
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
            images = training.images.normalise(torch.stack(crops))
            loss = F.cross_entropy(model(images), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        training.step()
        assert training.curves.loss[-1] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_runs_differ_and_variants_of_a_run_start_alike(data: ImageData) -> None:
    def stem(run: int, plan: dict[str, int]) -> torch.Tensor:
        return Training(Task("t", run, 1, plan), SETTINGS, data).model.conv1.weight

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


def test_where_no_time_is_saved_plans_save_parameters() -> None:
    by_training, by_taylor = sensitivities("train", 1, "4"), sensitivities("taylor", 2, "4")
    ratio, plans = make_plans(
        SETTINGS, resnet18(10, width=8), times_of(-0.1), by_training, by_taylor
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


def study(accuracies: dict[str, list[float]], ratio: float, agree: bool) -> Study:
    by_training = sensitivities("train", 1, "2")
    costs = {
        path: {rank: (1 if agree else -1) * cost for rank, cost in by_training.costs[path].items()}
        for path in by_training.costs
    }
    by_taylor = Sensitivities("taylor", costs, costs, 1.0, seconds=0.1)
    times = times_of(0.5)
    plan = {path: next(iter(ranks)) for path, ranks in costs.items()}
    plans = dict.fromkeys((EVERYWHERE, BY_TRAINING, BY_TAYLOR), plan)
    search = Search(times, by_training, by_taylor, 0.2, 0.9, plans)
    curves = {
        variant: [
            Curves([1.0, 0.5], [1.0, 0.5], [10.0, accuracy], [1.0, 1.0])
            for accuracy in accuracies[variant]
        ]
        for variant in VARIANTS
    }
    step_times = {name: StepTime(10.0, (ratio, ratio, ratio)) for name in plans}
    step_times[DENSE] = StepTime(10.0, (1.0, 1.0, 1.0))
    settings = replace(SETTINGS, fractions=(0.5,), runs=3)
    return Study(settings, {"name": "none", "classes": 10}, search, curves, step_times)


def accuracies(**lost: float) -> dict[str, list[float]]:
    return {v: [a - lost.get(v, 0.0) for a in (80.0, 81.0, 82.5)] for v in VARIANTS}


def test_what_the_paper_says_holds_where_it_is_so() -> None:
    lost = accuracies(everywhere=5.0, by_training=0.2, by_taylor=0.1, basis_first=1.0)
    lost[FULL_FIRST] = [a - 3.0 for a in lost[DENSE]]
    claims = basis_claims(study(lost, 0.8, True))
    assert [claim.verdict for claim in claims] == ["holds"] * 8


def test_and_does_not_where_it_is_not() -> None:
    lost = accuracies(everywhere=-1.0, by_training=2.0, by_taylor=4.0, basis_first=3.0)
    claims = basis_claims(study(lost, 0.9, False))
    wrong = [claim.verdict == "does not hold" for claim in claims]
    assert wrong == [True, True, True, True, True, True, False, True]


def test_a_schedules_time_is_the_mean_of_its_epochs() -> None:
    found = study(accuracies(), 0.8, True)
    assert found.time_ratio(FULL_FIRST)[1] == pytest.approx(0.9)
    assert found.time_ratio(BASIS_FIRST)[1] == pytest.approx(0.9)
    assert found.epoch_seconds(FULL_FIRST) == pytest.approx(0.9 * 0.01 * 50_000 / 2)


def test_presets_say_what_is_reduced() -> None:
    paper = preset_settings("paper", synthetic=False, autocast=True)
    recipe = paper.recipe
    assert (recipe.width, recipe.batch, recipe.rate, recipe.weight_decay) == (64, 128, 0.1, 5e-4)
    assert recipe.autocast
    assert paper.train_images is None
    assert paper.reduced == ""
    assert "synthetic" in preset_settings("quick", synthetic=True, autocast=False).reduced
    assert "synthetic" not in preset_settings("quick", synthetic=False, autocast=False).reduced


def test_autocast_trains_in_bfloat16(data: ImageData) -> None:
    settings = replace(SETTINGS, recipe=replace(SETTINGS.recipe, autocast=True))
    training = Training(Task("t", 0, 1, PLAN), settings, data)
    seen: list[torch.dtype] = []
    handle = training.model.layer4.register_forward_hook(
        lambda module, args, output: seen.append(args[0].dtype)
    )
    training.step()
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert training.curves.loss[0] < 5
