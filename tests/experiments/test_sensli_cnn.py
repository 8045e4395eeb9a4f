"""The CNN study: training with shared pasts, merit passes, resuming, and the whole in miniature."""

from __future__ import annotations

import html
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny_cnn_study
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.data.images import ImageData
from growkernels.experiments import sensli
from growkernels.experiments.run_folder import RunFolderError
from growkernels.experiments.sensli import cnn_merits, cnn_results
from growkernels.experiments.sensli.cnn_engine import CnnRun
from growkernels.experiments.sensli.cnn_merits import attempt_insertion, training_flops
from growkernels.experiments.sensli.cnn_settings import CnnOptimizer, CnnSetting, cnn_preset
from growkernels.experiments.sensli.cnn_study import run_cnn
from growkernels.models.vgg import layers_per_stage, vgg

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


def trained(setting: CnnSetting, run: int = 0) -> CnnRun:
    result = CnnRun(setting, run, image_data())
    while not result.done:
        result.step()
    return result


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("optimizer", [CnnOptimizer("plain", 0.05), MOMENTUM], ids=lambda o: o.name)
def test_a_run_restored_after_every_epoch_ends_with_the_same_bits(
    name: str, optimizer: CnnOptimizer
) -> None:
    setting = replace(SETTINGS[name], optimizer=optimizer)
    whole, interrupted = trained(setting), CnnRun(setting, 0, image_data())
    while not interrupted.done:
        interrupted.step()
        file = io.BytesIO()
        torch.save(interrupted.state_dict(), file)
        file.seek(0)
        interrupted = CnnRun(setting, 0, image_data())
        interrupted.load_state_dict(torch.load(file, weights_only=True))
    assert interrupted.curves.keys() == whole.curves.keys()
    for key, curve in whole.curves.items():
        again = interrupted.curves[key]
        assert (again.loss, again.error, again.test_loss) == (
            curve.loss, curve.error, curve.test_loss,
        )  # fmt: skip
        assert again.layers == curve.layers
        if curve.merit_pass is not None:
            assert again.merit_pass is not None
            assert again.merit_pass.merits == curve.merit_pass.merits


def test_plain_is_the_bare_gradient_step() -> None:
    run = CnnRun(SETTINGS["cnn_exp9"], 0, image_data())
    reference = run._new_model((1, 1, 1))
    images, order = run._epoch_images(1)
    for index in order.split(run.setting.batch):
        loss = F.cross_entropy(
            reference(run.normalise(images[index])), run.data.train_labels[index]
        )
        reference.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter -= run.setting.optimizer.rate * parameter.grad
    run.step()
    torch.testing.assert_close(weights(run.networks["1-1-1"].model), weights(reference))


def test_every_epoch_has_its_own_crops_and_order() -> None:
    run = CnnRun(SETTINGS["cnn_exp9"], 0, image_data())
    images, order = run._epoch_images(1)
    again, same_order = run._epoch_images(1)
    assert torch.equal(images, again)
    assert torch.equal(order, same_order)
    run.step()
    later, other_order = run._epoch_images(1)
    assert not torch.equal(images, later)
    assert not torch.equal(order, other_order)


def test_runs_have_their_own_initial_values_and_variants_of_a_run_share_theirs() -> None:
    setting = SETTINGS["cnn_exp5"]
    first, second = (CnnRun(setting, run, image_data()) for run in (0, 1))
    assert not torch.equal(
        weights(first._new_model((1, 1, 1))), weights(second._new_model((1, 1, 1)))
    )
    run = trained(setting)
    small, largest = (cnn_results.curve([run], name)[:, 0] for name in ("small", "max"))
    assert torch.equal(small[:2], largest[:2])
    assert not torch.equal(small[2:], largest[2:])
    assert layers_of(run, "large") == (2, 1, 1)
    assert sum(layers_of(run, "max")) == 4


def layers_of(run: CnnRun, name: str) -> tuple[int, ...]:
    variant = cnn_results.variant_named(run.setting, name)
    return run.variant_curves(variant)[-1][0].layers


def test_a_declined_attempt_leaves_the_small_net_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cnn_merits, "TAU", 1e9)
    run = trained(SETTINGS["cnn_exp12"])
    for name in ("insert_1", "insert_3"):
        assert cnn_results.decisions(run, name) == ["declined"]
        assert torch.equal(cnn_results.curve([run], name), cnn_results.curve([run], "small"))


def test_a_tiny_threshold_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cnn_merits, "TAU", 1e-9)
    run = trained(SETTINGS["cnn_exp12"])
    assert sum(layers_of(run, "insert_1")) == 4
    assert cnn_results.decisions(run, "insert_1") != ["declined"]


def test_the_final_architecture_is_trained_from_scratch_for_all_epochs() -> None:
    run = trained(SETTINGS["cnn_exp1"])
    assert sum(layers_of(run, "sensli")) == 6
    assert layers_of(run, "final") == layers_of(run, "sensli")
    assert cnn_results.curve([run], "final").isfinite().all()
    assert not torch.equal(
        cnn_results.curve([run], "final")[0], cnn_results.curve([run], "sensli")[0]
    )


def test_without_an_insertion_there_is_no_final_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cnn_merits, "TAU", 1e9)
    declining = next(s for s in cnn_preset("quick", "plain").settings if s.name == "cnn_exp1")
    tiny = SETTINGS["cnn_exp1"]
    attempts = tuple(replace(a, rule="relative") for a in tiny.variants[0].attempts)
    variants = (replace(declining.variants[0], attempts=attempts), declining.variants[1])
    run = trained(replace(tiny, variants=variants))
    assert cnn_results.decisions(run, "sensli") == ["declined"] * 3
    assert run.variant_curves(variants[1]) == []


def grown(rule: str) -> tuple[nn.Sequential, nn.Sequential, cnn_merits.MeritPass, Tensor]:
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
    return before, after, attempt_insertion(after, optimizer, lambda: batches, rule, 3), images


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


def test_a_network_that_diverged_declines_and_says_why() -> None:
    model = vgg((3, 4, 5), image_size=16, classes=2, head_width=6)
    with torch.no_grad():
        model[-1].weight.fill_(torch.inf)
    batch = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    attempt = attempt_insertion(
        model, torch.optim.SGD(model.parameters(), 0.1), lambda: [batch], "max", 0
    )
    assert attempt.inserted is None
    assert "NaN" in attempt.reason
    assert layers_per_stage(model) == (1, 1, 1)


def test_our_merits_are_those_of_the_authors_extended_network() -> None:
    times = CnnRun(SETTINGS["cnn_exp5"], 0, image_data()).time_merit_passes(batches=2)
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


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = numpy.random.default_rng(0)
    for split, count in (("train", 14), ("test", 5)):
        for name in ("a", "b", "c"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (16, 16, 3), numpy.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    return folder


@pytest.fixture(scope="module")
def finished(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_cnn("quick", "plain", data_folder, "cpu", out, False, tiny_cnn_study.preset())
    return out


def numbers(out: Path) -> dict[str, object]:
    """Everything in the summary that does not depend on the clock."""
    summary = json.loads((out / "summary.json").read_text())
    for variants in summary["settings"].values():
        for variant in variants.values():
            del variant["seconds"]
    claims = [claim for claim in summary["claims"] if "training time" not in claim["measured"]]
    assert len(claims) == len(summary["claims"]) - 1
    return {"overview": summary["overview"], "settings": summary["settings"], "claims": claims}


def test_the_folder_holds_what_is_promised(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["settings"]) == set(SETTINGS)
    value = summary["settings"]["cnn_exp5"]["max"]
    assert {"loss_mean", "loss_sem", "error_mean", "error_sem", "runs", "seconds"} <= set(value)
    assert value["runs"] == 2
    assert summary["data"]["name"] == "3 classes (JPEG)"
    assert summary["data"]["train_images"] == 36
    assert set(summary["merit_pass_milliseconds_per_batch"]) == {"cnn_exp5", "cnn_exp9"}
    assert {c["verdict"] for c in summary["claims"]} <= {
        "holds", "does not hold", "cannot be told"
    }  # fmt: skip
    records = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    epochs = [r for r in records if "epoch" in r and r["variant"] == "final"]
    assert len(epochs) == 2 * 8
    attempts = [r for r in records if "attempt_before_epoch" in r]
    assert all(set(r["merits"]) == {"frobenius", "frobenius_scaled", "operator"} for r in attempts)
    assert {p.name for p in (finished / "plots").iterdir()} == {
        "training_loss.png", "test_error.png", "merits.png", "insertion_times.png"
    }  # fmt: skip


def test_the_report_says_what_was_reduced_and_what_differs(finished: Path) -> None:
    page = html.unescape((finished / "report.html").read_text())
    assert page.count('src="data:image/png;base64,') == 4
    for words in ("Much is small.", "a lossy format", "one vector for all ten runs", "plain SGD"):
        assert words in page


def test_killed_and_resumed_ends_with_the_same_numbers(
    finished: Path, data_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    program = [sys.executable, str(Path(tiny_cnn_study.__file__)), str(data_folder), str(out)]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL)
    while not list((out / "state").glob("cnn_*.pt")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    with pytest.raises(RunFolderError, match="--resume"):
        run_cnn("quick", "plain", data_folder, "cpu", out, False, tiny_cnn_study.preset())
    other = tiny_cnn_study.preset(MOMENTUM)
    with pytest.raises(RunFolderError, match="different: settings"):
        run_cnn("quick", "momentum", data_folder, "cpu", out, True, other)
    run_cnn("quick", "plain", data_folder, "cpu", out, True, tiny_cnn_study.preset())
    assert numbers(out) == numbers(finished)
    assert sorted((out / "metrics.jsonl").read_text().count(k) for k in SETTINGS) == sorted(
        (finished / "metrics.jsonl").read_text().count(k) for k in SETTINGS
    )


def test_what_the_user_may_get_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--net cnn needs images: give --data DIR"):
        sensli.run("quick", "cnn", None, "cpu", out)
    with pytest.raises(ValueError, match="--optimizer is 'adam'"):
        sensli.run("quick", "cnn", tmp_path, "cpu", out, optimizer="adam")
    with pytest.raises(ValueError, match="--optimizer is for --net cnn"):
        sensli.run("quick", "fc", None, "cpu", out, optimizer="momentum")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        sensli.run("quick", "cnn", tmp_path / "none", "cpu", out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(RunFolderError, match="is a file"):  # told before images are looked for
        sensli.run("quick", "cnn", tmp_path / "none", "cpu", out)
