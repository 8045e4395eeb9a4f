"""The study of non-uniform scaling: growing while training, resuming, the whole in miniature."""

from __future__ import annotations

import html
import io
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny_scaling_study
import torch
from PIL import Image

from growkernels.data.images import ImageData
from growkernels.data.synthetic_images import synthetic_images
from growkernels.experiments import scaling
from growkernels.experiments.run_folder import RunFolderError
from growkernels.experiments.scaling import claims
from growkernels.experiments.scaling.engine import ScalingRun, target_parameters
from growkernels.experiments.scaling.history import Epoch, GrowthStep, History
from growkernels.experiments.scaling.image_cache import store_images, stored_images
from growkernels.experiments.scaling.recipe import Batches, build_optimizer, learning_rate
from growkernels.experiments.scaling.results import added_by_layer, final, growth_share, root
from growkernels.experiments.scaling.settings import (
    DATA,
    LARGE,
    SMALL,
    Architecture,
    Recipe,
    preset_setting,
    reduced,
)
from growkernels.experiments.scaling.study import run_study
from growkernels.growth import insertions
from growkernels.models.deit import deit

STUDY = tiny_scaling_study.setting()
SETTING = replace(STUDY, epochs=5)  # of single runs
LIMITS = tiny_scaling_study.LIMITS


@pytest.fixture(scope="module")
def images() -> ImageData:
    return synthetic_images(40, 20, torch.Generator().manual_seed(1))


def trained(name: str, images: ImageData, epochs: int = SETTING.epochs) -> ScalingRun:
    run = ScalingRun(SETTING, SETTING.variant(name), 0, images)
    while run.epoch < epochs:
        run.step()
    return run


def measured(history: History) -> tuple[object, ...]:
    """Everything that does not depend on the clock."""
    return (
        history.flops,
        [replace(epoch, seconds=0.0) for epoch in history.epochs],
        [
            replace(step, collect_seconds=0.0, score_seconds=0.0, surgery_seconds=0.0)
            for step in history.growth
        ],
    )


@pytest.mark.parametrize("name", ["splitting", "gated_eigenvector"])
def test_a_run_restored_after_every_epoch_ends_with_the_same_bits(
    name: str, images: ImageData
) -> None:
    variant = SETTING.variant(name)
    whole, interrupted = trained(name, images), ScalingRun(SETTING, variant, 0, images)
    while not interrupted.done:
        interrupted.step()
        file = io.BytesIO()
        torch.save(interrupted.state_dict(), file)
        file.seek(0)
        interrupted = ScalingRun(SETTING, variant, 0, images)
        interrupted.load_state_dict(torch.load(file, weights_only=True))
    assert measured(interrupted.history) == measured(whole.history)
    assert len(whole.history.growth) > 1


def test_a_grown_variant_continues_the_reduced_network(images: ImageData) -> None:
    trunk = trained("reduced", images, SETTING.first_growth)
    whole = trained("splitting", images)
    continued = ScalingRun(SETTING, SETTING.variant("splitting"), 0, images)
    continued.load_state_dict(trunk.state_dict())
    while not continued.done:
        continued.step()
    assert measured(continued.history) == measured(whole.history)
    assert measured(trunk.history)[1] == measured(whole.history)[1][: SETTING.first_growth]


@pytest.mark.parametrize(
    "name",
    [
        "splitting_large",
        "s2d",
        "gradient_sum",
        "magnitude",
        "uniform",
        "gated_parent",
        "interval_1",
    ],
)
def test_growth_reaches_the_size_asked_for_and_keeps_the_function(
    name: str, images: ImageData
) -> None:
    run = trained(name, images, SETTING.epochs)
    growth = run.variant.growth
    assert growth is not None
    wanted = target_parameters(SETTING, growth.share, 10)
    # The dearest neuron: a pair that reads fc1's widened output.
    assert wanted - 2 * 33 < run.history.epochs[-1].parameters <= wanted
    for step in run.history.growth:
        assert step.epoch in SETTING.growth_epochs(run.variant)
        assert step.change <= claims.MAX_CHANGE
        assert 0 < step.parameters <= step.budget
        assert sum(step.added) > 0
    sizes = [epoch.parameters for epoch in run.history.epochs]
    assert sizes == sorted(sizes)
    assert sizes[-1] - sizes[0] == sum(step.parameters for step in run.history.growth)


def test_an_even_growth_takes_the_same_share_of_every_layer(images: ImageData) -> None:
    step = trained("uniform", images, 2).history.growth[0]
    shares = [
        added / len(scores)
        for name, scores, added in zip(step.layers, step.scores, step.added, strict=True)
        if root(name) == name
    ]
    neuron = max(1 / len(scores) for scores in step.scores)
    assert max(shares) - min(shares) <= neuron
    assert min(shares) > 0
    chosen = trained("splitting", images, 2).history.growth[0]
    assert chosen.added != step.added


def test_only_what_has_an_activation_grows_by_s2d(images: ImageData) -> None:
    run = trained("s2d", images, 2)
    (step,) = run.history.growth
    assert {root(name).rpartition(".")[2] for name in step.layers} == {"fc1"}
    assert insertions(run.model)


def test_variants_of_a_run_see_the_same_batches_and_runs_differ(images: ImageData) -> None:
    first, other, second = (
        ScalingRun(SETTING, SETTING.variant(name), run, images)
        for name, run in (("reduced", 0), ("homogeneous", 0), ("reduced", 1))
    )
    seen = [next(r.batches.training(r._seeded(1)))[0] for r in (first, other, second)]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(first.model.head.weight, second.model.head.weight)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    recipe = Recipe(batch=8, rate=1e-3, warmup_epochs=5)
    rates = [learning_rate(recipe, 100, epoch) for epoch in (0, 2.5, 50, 100)]
    assert rates == pytest.approx([1e-6, 0.5e-3 + 0.5e-6, 0.5e-3 + 0.5e-5, 1e-5])


def test_vectors_and_positions_are_not_decayed() -> None:
    model = deit(embed=16, depth=1, heads=2, image_size=32, classes=3)
    plain, decayed = build_optimizer(Recipe(8, 1e-3, 1), model).param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert any(p is model.pos_embed for p in plain["params"])
    assert all(p.ndim == 1 or p is model.pos_embed or p is model.cls_token for p in plain["params"])
    assert len(plain["params"]) + len(decayed["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("resized", [True, False])
def test_the_whole_recipe_gives_mixed_views_that_repeat_with_their_generator(
    resized: bool, images: ImageData
) -> None:
    recipe = Recipe(batch=12, rate=1e-3, warmup_epochs=1, resized_crops=resized)
    batches = Batches(images, recipe, 24 if resized else 32)
    first, again = (list(batches.training(torch.Generator().manual_seed(3))) for _ in range(2))
    assert len(first) == 3  # of 40 images; the last 4 are no batch
    size = 24 if resized else 32
    for (x, targets), (x_again, targets_again) in zip(first, again, strict=True):
        assert x.shape == (12, 3, size, size)
        assert x.isfinite().all()
        assert torch.equal(x, x_again)
        assert torch.equal(targets, targets_again)
        torch.testing.assert_close(targets.sum(1), torch.ones(12))
    plain = replace(recipe, mixup=0.0, smoothing=0.0)
    _, targets = next(Batches(images, plain, size).training(torch.Generator().manual_seed(3)))
    views = targets.argmax(1).view(4, 3)
    assert torch.equal(views, views[:, :1].expand(4, 3))  # three views of four images


def test_tests_show_the_middle_of_the_image(images: ImageData) -> None:
    recipe = Recipe(batch=12, rate=1e-3, warmup_epochs=1)
    shown, labels = next(Batches(images, recipe, 24).test())
    whole, _ = next(Batches(images, recipe, 32).test())
    assert torch.equal(shown, whole[:, :, 4:28, 4:28])
    assert torch.equal(labels, images.test_labels)


def test_widths_lie_between_reduced_and_full_by_their_share_of_parameters() -> None:
    full = Architecture(embed=384, depth=12, heads=6, patch=16, image_size=224)
    assert full.widths(0.0) == (192, 768)
    assert full.widths(1.0) == (384, 1536)
    net = SETTING.architecture
    for share in (SMALL, LARGE):
        attention, hidden = net.widths(share)
        assert attention % net.heads == 0
        built = deit(
            embed=net.embed, depth=net.depth, heads=net.heads, attention_width=attention,
            mlp_width=hidden, patch=net.patch, image_size=net.image_size, classes=10,
        )  # fmt: skip
        count = sum(p.numel() for p in built.parameters())
        assert abs(count - target_parameters(SETTING, share, 10)) <= 33 / 2  # half a row of fc1


def test_the_paper_preset_has_the_papers_numbers() -> None:
    paper = preset_setting("paper", 256)
    sizes = [target_parameters(paper, share, 100) / 1e6 for share in (0, SMALL, LARGE, 1)]
    assert sizes == pytest.approx([11.07, 15.6, 19.4, 21.7], abs=0.06)
    assert (paper.architecture.patch, paper.architecture.image_size) == (16, 224)
    assert preset_setting("paper", 64).architecture.patch == 8
    assert preset_setting("paper", 32).architecture.patch == 4
    assert not preset_setting("paper", 32).recipe.resized_crops
    usual = paper.variant("splitting")
    assert paper.growth_epochs(usual) == [50, 80, 110, 140, 170, 200, 230, 260, 290]
    recipe = paper.recipe
    assert (recipe.rate, recipe.weight_decay, recipe.smoothing) == (5e-4 * 256 / 512, 0.05, 0.1)
    assert (recipe.mixup, recipe.cutmix, recipe.erasing, recipe.drop_path) == (0.8, 1, 0.25, 0.1)
    assert reduced("paper", paper, 126_000, 100) == ""
    assert DATA["paper"].train is None


def history(top1: float, parameters: int = 1000, seconds: float = 2.0) -> History:
    epochs = [Epoch(1.0, 1.0, top1, 50.0, parameters, seconds)] * 4
    step = GrowthStep(1, 9, ["b.0.q", "b.0.q.branches.0.plus"], [[-1.0], [1.0]], [2, 3], 8, 1e-6,
                      0.5, 1.0, 0.5)  # fmt: skip
    return History(5, epochs, [step])


def test_verdicts_point_the_right_way() -> None:
    results = {
        "high": [history(50.0 + i) for i in range(3)],
        "low": [history(40.0 + i) for i in range(3)],
        "mixed": [history(50.0 + 5 * (-1) ** i) for i in range(3)],
    }
    assert claims._higher(results, "high", "low", "s").verdict == "holds"
    assert claims._higher(results, "low", "high", "s").verdict == "does not hold"
    assert claims._higher(results, "high", "mixed", "s").verdict == "cannot be told"
    assert "+10.00 ± 0.00 points" in claims._higher(results, "high", "low", "s").measured
    for usual, others, verdict in (
        ("high", ["low"], "holds"),
        ("low", ["high", "low"], "does not hold"),
        ("high", ["low", "mixed"], "cannot be told"),
    ):
        named = {"splitting": results[usual], **results}
        assert claims._best_interval(named, others).verdict == verdict


def test_tests_come_now_and_then_and_at_the_end(images: ImageData) -> None:
    tested = [SETTING.tests_after(epoch) for epoch in range(SETTING.epochs)]
    assert tested == [False, True, True, True, True]
    epochs = trained("reduced", images).history.epochs
    assert [epoch.top1 is not None for epoch in epochs] == tested


def test_sums_over_growth() -> None:
    runs = [history(1.0, seconds=4.0)]
    assert growth_share(runs).tolist() == pytest.approx([100 * 2 / 18])
    assert added_by_layer(runs[0].growth[0], ["b.0.q"]).tolist() == [5]
    assert final(runs, "top1").tolist() == [1.0]


def test_the_cache_is_made_once_and_again_for_another_source(
    images: ImageData, tmp_path: Path
) -> None:
    path = tmp_path / "state" / "images.pt"
    made = []

    def make() -> ImageData:
        made.append(1)
        return images

    for source in ({"a": 1}, {"a": 1}, {"a": 2}):
        store_images(path, source, make)
    assert len(made) == 2
    again = stored_images(path)
    assert torch.equal(again.train_images, images.train_images)
    assert (again.name, again.classes) == (images.name, images.classes)

    def fail() -> ImageData:
        raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        store_images(path, {"a": 3}, fail)
    assert [p.name for p in path.parent.iterdir()] == ["images.pt"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="delete it and use --resume again"):
        stored_images(path)


def test_a_cache_that_cannot_be_written_is_one_sentence(images: ImageData, tmp_path: Path) -> None:
    path = tmp_path / "state" / "images.pt"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limit[1]))  # a disk that soon is full
    try:
        with pytest.raises(RunFolderError, match=r"could not be written to .*images\.pt \(File"):
            store_images(path, {"a": 1}, lambda: images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(path.parent.iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_study("quick", None, "cpu", out, False, STUDY, LIMITS)
    return out


def numbers(out: Path) -> dict[str, object]:
    """Everything in the summary that does not depend on the clock."""
    summary = json.loads((out / "summary.json").read_text())
    for variant in summary["variants"].values():
        for key in ("seconds", "last_epoch_seconds", "growth_seconds", "growth_share_of_time"):
            variant.pop(key, None)
    clocked = [c for c in summary["claims"] if "training time" in c["claim"]]
    assert len(clocked) == 1
    summary["claims"].remove(clocked[0])
    return {key: summary[key] for key in ("variants", "claims", "data", "reduced")}


def test_the_folder_holds_what_is_promised(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["variants"]) == {v.name for v in STUDY.variants}
    assert summary["data"]["name"].startswith("synthetic")
    assert {c["verdict"] for c in summary["claims"]} <= {
        "holds", "does not hold", "cannot be told"
    }  # fmt: skip
    changes = [v["largest_output_change"] for v in summary["variants"].values() if
               "largest_output_change" in v]  # fmt: skip
    assert max(changes) <= claims.MAX_CHANGE
    records = [json.loads(x) for x in (finished / "metrics.jsonl").read_text().splitlines()]
    assert sum("epoch" in r for r in records) == len(STUDY.variants) * 2 * STUDY.epochs
    steps = [r for r in records if "growth_before_epoch" in r and r["variant"] == "splitting"]
    assert all("lowest" in layer for r in steps for layer in r["layers"].values())
    assert {p.name for p in (finished / "plots").iterdir()} == {
        "accuracy.png", "accuracy_by_parameters.png", "growth_cost.png", "spectra.png",
        "training_loss.png", "where_grown.png",
    }  # fmt: skip
    assert not (finished / "state" / "images.pt").exists()


def test_the_report_stands_alone_and_says_what_was_reduced_and_what_differs(
    finished: Path,
) -> None:
    page = html.unescape((finished / "report.html").read_text())
    assert page.count('src="data:image/png;base64,') == 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    for words in ("This is the quick preset", "synthetic", "sums each neuron's row", "gate *"):
        assert words in page


def test_killed_and_resumed_ends_with_the_same_numbers(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = [sys.executable, str(Path(tiny_scaling_study.__file__)), str(out)]
    # Once among the networks that do not grow, once among those that do.
    for awaited in ("reduced-run0.pt", "splitting-run0.pt"):
        process = subprocess.Popen([*program, "--resume"], stdout=subprocess.DEVNULL)
        while not (out / "state" / awaited).exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (out / "summary.json").exists()
    with pytest.raises(RunFolderError, match="--resume"):
        run_study("quick", None, "cpu", out, False, STUDY, LIMITS)
    time.sleep(0.2)  # the killed run's workers notice, and let go of the folder
    with pytest.raises(RunFolderError, match="different: setting"):
        run_study("quick", None, "cpu", out, True, replace(STUDY, seed=2), LIMITS)
    run_study("quick", None, "cpu", out, True, STUDY, LIMITS)
    assert numbers(out) == numbers(finished)
    lines = [len((f / "metrics.jsonl").read_text().splitlines()) for f in (out, finished)]
    assert lines[0] == lines[1]


def test_images_of_a_folder_are_used_and_a_bad_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = numpy.random.default_rng(0)
    folder = tmp_path / "data"
    for split, count in (("train", 8), ("val", 4)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (40, 50 + i, 3), numpy.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    limits = replace(LIMITS, train=None, test=None, square=32)
    few = replace(STUDY, runs=1, epochs=2, variants=STUDY.variants[:1])
    done: list[tuple[object, ...]] = []
    monkeypatch.setattr(
        "growkernels.experiments.scaling.study._conclude", lambda *args: done.append(args)
    )
    out = tmp_path / "out"
    run_study("quick", folder, "cpu", out, False, few, limits)
    data = json.loads((out / "config.json").read_text())["data"]
    assert (data["name"], data["size"], data["train_images"]) == ("2 classes (JPEG)", "32x32", 16)
    assert len(done) == 1
    (folder / "train" / "b" / "3.jpg").write_bytes(b"no image")
    bad = tmp_path / "bad"
    with pytest.raises(ValueError, match=r"3\.jpg cannot be read as an image"):
        run_study("quick", folder, "cpu", bad, False, few, limits)
    assert not bad.exists()


def test_what_the_user_may_get_wrong(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="--preset is 'big'; choose one of quick, paper"):
        scaling.run("big", None, "cpu", out)
    with pytest.raises(ValueError, match="--preset paper needs images: give --data DIR"):
        scaling.run("paper", None, "cpu", out)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        scaling.run("quick", tmp_path / "none", "cpu", out)
    with pytest.raises(ValueError, match="--device warp cannot be used here"):
        scaling.run("quick", None, "warp", out)
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").touch()
    with pytest.raises(RunFolderError, match="already holds files"):
        scaling.run("quick", None, "cpu", out)
    assert math.isclose(SMALL + (21.7 - 15.6) / 10.7, 1.0)
