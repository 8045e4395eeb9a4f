"""The study of non-uniform scaling: growing while training, its recipe, and the images' store."""

from __future__ import annotations

import io
import resource
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import tiny_scaling_study
import torch
from PIL import Image

from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.images.store import (
    Selection,
    provide_images,
    store_images,
    stored_images,
)
from growkernels.experiments.images.synthetic_images import synthetic_images
from growkernels.experiments.models.deit import deit
from growkernels.experiments.run_folder import RunFolderError
from growkernels.experiments.scaling.growing import root
from growkernels.experiments.scaling.recipe import Batches, build_optimizer, learning_rate
from growkernels.experiments.scaling.settings import (
    LARGE,
    SELECTIONS,
    SMALL,
    Architecture,
    Recipe,
    preset_setting,
)
from growkernels.experiments.scaling.training import ScalingTraining, epochs_of, target_parameters
from growkernels.experiments.study import Result
from growkernels.growth import insertions

STUDY = tiny_scaling_study.setting()
SETTING = replace(STUDY, epochs=5)  # of single runs


@pytest.fixture(scope="module")
def images() -> ImageData:
    return synthetic_images(40, 20, torch.Generator().manual_seed(1))


def new(name: str, images: ImageData, run: int = 0) -> ScalingTraining:
    return ScalingTraining(SETTING, SETTING.variant(name), run, images)


def trained(
    training: ScalingTraining, epochs: int = SETTING.epochs, since: int = 0
) -> ScalingTraining:
    for epoch in range(since, epochs):
        training.advance(epoch)
    return training


def stored(training: ScalingTraining) -> Result:
    file = io.BytesIO()
    torch.save([training.measured, training.state()], file)
    file.seek(0)
    return Result(*torch.load(file, weights_only=True))


def measured(training: ScalingTraining, since: int = 0) -> dict[str, object]:
    """Everything that does not depend on the clock."""
    steps = {k: v[since:] for k, v in training.measured["steps"].items() if k != "seconds"}
    growth = [
        {k: v for k, v in step.items() if not k.endswith("seconds")}
        for step in training.measured["growth"]
    ]
    return steps | {"growth": growth, "flops": training.measured["flops"]}


@pytest.mark.parametrize("name", ["splitting", "gated_eigenvector"])
def test_a_run_restored_after_every_epoch_ends_with_the_same_bits(
    name: str, images: ImageData
) -> None:
    whole, interrupted = trained(new(name, images)), new(name, images)
    for epoch in range(SETTING.epochs):
        interrupted.advance(epoch)
        state = stored(interrupted)
        interrupted = new(name, images)
        interrupted.load(state, own=True)
    assert measured(interrupted) == measured(whole)
    assert len(whole.measured["growth"]) > 1


def test_a_grown_variant_continues_the_reduced_network(images: ImageData) -> None:
    first = SETTING.first_growth
    trunk = trained(new("reduced", images), first)
    whole = trained(new("splitting", images))
    continued = new("splitting", images)
    continued.load(stored(trunk), own=False)
    assert measured(trained(continued, since=first)) == measured(whole, since=first)
    losses = [training.measured["steps"]["loss"] for training in (trunk, whole)]
    assert losses[0] == losses[1][:first]


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
    run = trained(new(name, images))
    growth = run.variant.growth
    assert growth is not None
    wanted = target_parameters(SETTING, growth.share, 10)
    # The dearest neuron: a pair that reads fc1's widened output.
    sizes, growth = run.measured["steps"]["parameters"], run.measured["growth"]
    assert wanted - 2 * 33 < sizes[-1] <= wanted
    for step in growth:
        assert step["epoch"] in SETTING.growth_epochs(run.variant)
        assert step["change"] <= 1e-5
        assert 0 < step["parameters"] <= step["budget"]
        assert sum(step["added"]) > 0
    assert sizes == sorted(sizes)
    assert sizes[-1] - sizes[0] == sum(step["parameters"] for step in growth)


def test_an_even_growth_takes_the_same_share_of_every_layer(images: ImageData) -> None:
    step = trained(new("uniform", images), 2).measured["growth"][0]
    shares = [
        added / len(scores)
        for name, scores, added in zip(step["layers"], step["scores"], step["added"], strict=True)
        if root(name) == name
    ]
    neuron = max(1 / len(scores) for scores in step["scores"])
    assert max(shares) - min(shares) <= neuron
    assert min(shares) > 0
    chosen = trained(new("splitting", images), 2).measured["growth"][0]
    assert chosen["added"] != step["added"]


def test_only_what_has_an_activation_grows_by_s2d(images: ImageData) -> None:
    run = trained(new("s2d", images), 2)
    (step,) = run.measured["growth"]
    assert {root(name).rpartition(".")[2] for name in step["layers"]} == {"fc1"}
    assert insertions(run.model)


def test_variants_of_a_run_see_the_same_batches_and_runs_differ(images: ImageData) -> None:
    first, other, second = (
        new(name, images, run) for name, run in (("reduced", 0), ("homogeneous", 0), ("reduced", 1))
    )
    seen = [next(r.batches.training(r._seeded(1, 0)))[0] for r in (first, other, second)]
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
    assert SELECTIONS["paper"].train is None
    desk = preset_setting("desk", 32)
    assert desk.runs >= 6
    assert {"reduced", "homogeneous", "splitting", "random", "uniform"} <= {
        variant.name for variant in desk.variants
    }


def test_tests_come_now_and_then_and_at_the_end(images: ImageData) -> None:
    tested = [SETTING.tests_after(epoch) for epoch in range(SETTING.epochs)]
    assert tested == [False, True, True, True, True]
    accuracies = trained(new("reduced", images)).measured["steps"]["top1"]
    assert [accuracy is not None for accuracy in accuracies] == tested


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
    for other in ({"a": 1}, [1], {"source": {"a": 1}, "data": {"name": "none"}}):
        torch.save(other, path)
        with pytest.raises(RunFolderError, match=r"does not hold images .*delete it and use --res"):
            store_images(path, {"a": 1}, make)


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


def test_images_of_a_folder_are_used_and_a_bad_one_leaves_nothing(tmp_path: Path) -> None:
    random = numpy.random.default_rng(0)
    folder = tmp_path / "data"
    for split, count in (("train", 8), ("val", 4)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (40, 50 + i, 3), numpy.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    path = tmp_path / "out" / "state" / "images.pt"
    about = provide_images(path, folder, Selection(None, None, 10, 64, 32))
    assert (about["name"], about["size"], about["train_images"]) == (
        "2 classes (JPEG)", "32x32", 16,
    )  # fmt: skip
    (folder / "train" / "b" / "3.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.jpg cannot be read as an image"):
        provide_images(tmp_path / "bad" / "images.pt", folder, Selection(None, None, 10, 64, 32))
    assert not (tmp_path / "bad").exists()


def test_a_control_does_no_fewer_operations_than_what_it_is_compared_with(
    images: ImageData,
) -> None:
    """Counted on the trainings themselves: forward operations times images, and recorded passes."""
    whole = replace(STUDY, epochs=12, first_growth=4)
    classes, count = len(images.classes), len(images.train_labels)
    grown = whole.variant("splitting")
    training = ScalingTraining(whole, grown, 0, images)
    epoch_images = whole.recipe.epoch_images
    assert epoch_images is not None
    done = 0
    for epoch in range(whole.epochs):
        if epoch in whole.growth_epochs(grown):
            recorded = whole.growth_batches * whole.recipe.batch
            done += recorded * training.measured["flops"]
        training.advance(epoch)
        done += epoch_images * training.measured["flops"]
    for name in ("homogeneous_matched", "even_start_matched"):
        variant = whole.variant(name)
        epochs = epochs_of(whole, variant, classes, count)
        per_epoch = epoch_images * ScalingTraining(whole, variant, 0, images).measured["flops"]
        assert 0.95 * done <= epochs * per_epoch < done + per_epoch
