"""The CNN study: training with shared pasts, merit passes, and resuming."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny_cnn_study
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.models.vgg import layers_per_stage, vgg
from growkernels.experiments.seeds import seeded
from growkernels.experiments.sensli import cnn_merits
from growkernels.experiments.sensli.cnn_conclusion import CnnEvidence
from growkernels.experiments.sensli.cnn_merits import attempt_insertion, training_flops
from growkernels.experiments.sensli.cnn_settings import (
    CnnOptimizer,
    CnnPreset,
    CnnSetting,
    cnn_preset,
)
from growkernels.experiments.sensli.cnn_study import CnnStudy
from growkernels.experiments.sensli.cnn_training import CnnTraining
from growkernels.experiments.study import Result
from growkernels.experiments.table import Table

SETTINGS = {setting.name: setting for setting in tiny_cnn_study.preset().settings}
MOMENTUM = CnnOptimizer("momentum", 0.02, 0.9, 5e-4)


def image_data(train: int = 20, test: int = 10, size: int = 16) -> ImageData:
    generator = torch.Generator().manual_seed(5)

    def images(count: int) -> Tensor:
        return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)

    return ImageData(
        "noise", ("a", "b"), images(train), torch.arange(train) % 2, images(test),
        torch.arange(test) % 2,
    )  # fmt: skip


@dataclass(frozen=True)
class Source:
    images: ImageData
    device: str = "cpu"
    about: Any = None


def stored(value: Any) -> Any:
    """As a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(setting: CnnSetting, interrupted: bool = False) -> CnnEvidence:
    """Both runs of a setting; restored after every epoch if ``interrupted``."""
    study = CnnStudy(CnnPreset((setting,), None, None), Source(image_data()))
    results: dict[str, Result] = {}
    for stretch in study.stretches():
        # A copy: an optimizer goes on with the very tensors that it is given.
        training = study.begin(stretch, copy.deepcopy(results.get(stretch.parent or "")))
        for step in range(stretch.first, stretch.last):
            training.advance(step)
            if interrupted:
                training = study.resume(
                    stretch, Result(*stored([training.measured, training.state()]))
                )
        results[stretch.key] = Result(*stored([training.measured, training.state()]))
    return CnnEvidence(study, results, Table.of(study.records(results)))


def training(name: str, run: int = 0) -> CnnTraining:
    return CnnTraining(SETTINGS[name], run, image_data(), "cpu", (1, 1, 1))


def losses(found: CnnEvidence, setting: str, variant: str, run: int = 0) -> list[float]:
    curve = found.table.curve(variant, "loss", setting)
    return curve[run].tolist() if run in curve else []


def layers_of(found: CnnEvidence, setting: str, variant: str) -> tuple[int, ...]:
    return tuple(found.stretches(setting, variant, 0)[-1]["layers"])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("optimizer", [CnnOptimizer("plain", 0.05), MOMENTUM], ids=lambda o: o.name)
def test_a_run_restored_after_every_epoch_ends_with_the_same_bits(
    name: str, optimizer: CnnOptimizer
) -> None:
    def numbers(found: CnnEvidence) -> list[Any]:
        records = found.study.records(found.results)
        return [{k: v for k, v in record.items() if k != "seconds"} for record in records]

    setting = replace(SETTINGS[name], optimizer=optimizer, runs=1)
    assert numbers(trained(setting, interrupted=True)) == numbers(trained(setting))


def test_plain_is_the_bare_gradient_step() -> None:
    ours = training("cnn_exp9")
    reference = ours._new_model((1, 1, 1))
    images, order = ours.epoch_images(1, 0)
    for index in order.split(ours.setting.batch):
        loss = F.cross_entropy(
            reference(ours.normalise(images[index])), ours.data.train_labels[index]
        )
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= ours.setting.optimizer.rate * parameter.grad
    ours.advance(0)
    torch.testing.assert_close(weights(ours.model), weights(reference))


def test_every_epoch_has_its_own_crops_and_order() -> None:
    first, again, later = (training("cnn_exp9").epoch_images(1, epoch) for epoch in (0, 0, 1))
    for ours, same, other in zip(first, again, later, strict=True):
        assert torch.equal(ours, same)
        assert not torch.equal(ours, other)


def test_runs_have_their_own_initial_values_and_variants_of_a_run_share_theirs() -> None:
    assert not torch.equal(*(weights(training("cnn_exp5", run).model) for run in (0, 1)))
    found = trained(SETTINGS["cnn_exp5"])
    small, largest = (losses(found, "cnn_exp5", name) for name in ("small", "max"))
    assert small[:2] == largest[:2]
    assert small[2:] != largest[2:]
    assert layers_of(found, "cnn_exp5", "large") == (2, 1, 1)
    assert sum(layers_of(found, "cnn_exp5", "max")) == 4


def test_a_declined_attempt_leaves_the_small_net_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cnn_merits, "TAU", 1e9)
    found = trained(SETTINGS["cnn_exp12"])
    for name in ("insert_1", "insert_3"):
        assert found.decisions("cnn_exp12", name, 0) == ["declined"]
        assert losses(found, "cnn_exp12", name) == losses(found, "cnn_exp12", "small")
        assert found.runs("cnn_exp12", "inserted early", "loss") == {}


def test_a_tiny_threshold_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnn_merits, "TAU", 1e-9)
    found = trained(SETTINGS["cnn_exp12"])
    assert sum(layers_of(found, "cnn_exp12", "insert_1")) == 4
    assert found.decisions("cnn_exp12", "insert_1", 0) != ["declined"]
    assert found.runs("cnn_exp12", "inserted early", "loss").keys() == {0, 1}


def test_the_final_architecture_is_trained_from_scratch_for_all_epochs() -> None:
    found = trained(SETTINGS["cnn_exp1"])
    assert sum(layers_of(found, "cnn_exp1", "sensli")) == 6
    assert layers_of(found, "cnn_exp1", "final") == layers_of(found, "cnn_exp1", "sensli")
    final, grown = (losses(found, "cnn_exp1", name) for name in ("final", "sensli"))
    assert len(final) == len(grown) == 8
    assert final[0] != grown[0]
    assert found.obstacle("cnn_exp1", "sensli", "final") is None


def test_without_an_insertion_there_is_no_final_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cnn_merits, "TAU", 1e9)
    tiny = SETTINGS["cnn_exp1"]
    attempts = tuple(replace(a, rule="relative") for a in tiny.variants[0].attempts)
    variants = (replace(tiny.variants[0], attempts=attempts), tiny.variants[1])
    found = trained(replace(tiny, variants=variants))
    assert found.decisions("cnn_exp1", "sensli", 0) == ["declined"] * 3
    assert found.stretches("cnn_exp1", "final", 0) == []
    assert "no layer was inserted" in str(found.obstacle("cnn_exp1", "sensli", "final"))


def grown(
    rule: str, draw: int = 0
) -> tuple[nn.Sequential, nn.Sequential, cnn_merits.MeritPass, Tensor]:
    """The network before and after an attempt, the attempt, and some images."""
    generator = torch.Generator().manual_seed(2)
    before, after = (
        vgg((3, 4, 5), image_size=16, classes=2, head_width=6,
            generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )  # fmt: skip
    images = torch.randn(24, 3, 16, 16, generator=generator)
    labels = torch.randint(2, (24,), generator=generator)
    batches = list(zip(images.split(8), labels.split(8), strict=True))
    optimizer = torch.optim.SGD(after.parameters(), 0.1)
    attempt = attempt_insertion(after, optimizer, lambda: batches, rule, 3, seeded(draw))
    return before, after, attempt, images


@pytest.mark.parametrize("rule", ["max", "min"])
def test_an_insertion_goes_where_the_operator_norm_says_and_keeps_the_function(rule: str) -> None:
    before, after, attempt, images = grown(rule)
    values = attempt.merits["operator"]
    wanted = max(values) if rule == "max" else min(values)
    assert attempt.inserted == values.index(wanted)
    assert layers_per_stage(after)[attempt.inserted] == 2
    torch.testing.assert_close(after(images), before(images), rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for p in after.parameters())
    assert attempt.merits["operator"] != attempt.merits["frobenius"]
    sizes = torch.tensor([9 * width**2 for width in (3, 4, 5)], dtype=torch.float64)
    torch.testing.assert_close(
        torch.tensor(attempt.merits["frobenius_scaled"], dtype=torch.float64) * sizes,
        torch.tensor(attempt.merits["frobenius"], dtype=torch.float64),
    )


def test_a_position_drawn_at_random_follows_its_generator() -> None:
    places = [grown("random", draw)[2].inserted for draw in (*range(8), 0)]
    assert places[0] == places[-1]
    assert set(places) == {0, 1, 2}


def test_a_network_that_diverged_declines_and_says_why() -> None:
    model = vgg((3, 4, 5), image_size=16, classes=2, head_width=6)
    with torch.no_grad():
        model[-1].weight.fill_(torch.inf)
    batch = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    attempt = attempt_insertion(
        model, torch.optim.SGD(model.parameters(), 0.1), lambda: [batch], "max", 0, seeded(0)
    )
    assert attempt.inserted is None
    assert "NaN" in attempt.reason
    assert layers_per_stage(model) == (1, 1, 1)


def test_our_merits_are_those_of_the_authors_extended_network() -> None:
    times = training("cnn_exp5").time_merit_passes(batches=2)
    assert times.gap < 1e-4
    assert min(times.ordinary, times.driver, times.authors) > 0


def test_flops_are_those_of_the_shapes() -> None:
    model, _, attempt, images = grown("max")
    first = 3 * 3 * 9 * 16 * 16
    convolutions = first + 3 * 4 * 9 * 8 * 8 + 4 * 5 * 9 * 4 * 4
    linears = 5 * 2 * 2 * 6 + 6 * 6 + 6 * 2
    training = 2 * (3 * (convolutions + linears) - first)
    assert training_flops(model, images) == training
    virtual = 2 * 9 * (9 * 16 * 16 + 16 * 8 * 8 + 25 * 4 * 4)
    assert attempt.flops == 24 * (training + virtual)


def test_presets_are_the_papers_numbers() -> None:
    paper = {s.name: s for s in cnn_preset("paper", "momentum").settings}
    five, nine, twelve, one = (paper[f"cnn_exp{n}"] for n in (5, 9, 12, 1))
    assert five.widths == twelve.widths == one.widths == (64, 128, 256)
    assert nine.widths == (200, 200, 200)
    assert (five.epochs, nine.epochs, twelve.epochs, one.epochs) == (100, 100, 200, 200)
    assert (five.runs, nine.runs, twelve.runs, one.runs) == (10, 10, 1, 1)
    assert [v.attempts[0].epoch for v in twelve.variants[1:]] == list(range(10, 81, 10))
    assert [a.epoch for a in one.variants[0].attempts] == [50, 100, 150]
    sgd = five.optimizer
    assert (sgd.rate, sgd.momentum, sgd.weight_decay) == (0.01, 0.9, 5e-4)
    plain = cnn_preset("paper", "plain").settings[0].optimizer
    assert (plain.rate, plain.momentum, plain.weight_decay) == (0.01, 0.0, 0.0)
    assert cnn_preset("paper", "plain").train_limit is None
    desk = cnn_preset("desk", "plain")
    assert {setting.runs for setting in desk.settings} == {6}
    assert (desk.train_limit, desk.test_limit) == (20_000, None)
