"""The studies' training loops never make the host wait for a GPU, shown without one.

The loops run on torch's meta device, which has no values: whoever reads one there is found out, and
so are copies from the CPU that would wait, because they pass by here.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from growkernels.experiments.basis.settings import Recipe as BasisRecipe
from growkernels.experiments.basis.training import ImageTraining
from growkernels.experiments.images.folders import ImageData
from growkernels.experiments.scaling.settings import preset_setting
from growkernels.experiments.scaling.training import ScalingTraining
from growkernels.experiments.sensli.cnn_settings import cnn_preset
from growkernels.experiments.sensli.cnn_training import CnnTraining

META = torch.device("meta")
aten = torch.ops.aten


class Watch(TorchDispatchMode):
    """Counts the numbers read from the device (each is 0); a copy that waits is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].device == META:
            self.reads += 1
            return 0.0
        if func is aten._to_copy.default and args[0].device.type == "cpu":
            assert torch.device(kwargs.get("device") or "cpu") != META or kwargs.get("non_blocking")
        if func is aten.copy_.default and args[0].device == META:
            assert args[1].device == META or (args[2:] or [kwargs.get("non_blocking")])[0]
        return func(*args, **kwargs)


def images(size: int, count: int = 24) -> ImageData:
    labels = torch.arange(count) % 3
    pixels = torch.zeros(count, 3, size, size, dtype=torch.uint8)
    return ImageData("none", ("a", "b", "c"), pixels, labels, pixels, labels)


@pytest.fixture(autouse=True)
def uninitialized_memory_stays_so() -> None:
    """The meta device has none that could be filled."""
    torch.use_deterministic_algorithms(False)


def test_the_watch_sees_what_waits() -> None:
    with Watch() as watch:
        assert torch.zeros(3, device=META).sum().item() == 0.0
        assert watch.reads == 1
        with pytest.raises(AssertionError):
            torch.zeros(3).to(META)
        with pytest.raises(AssertionError):
            torch.zeros(3, device=META).copy_(torch.ones(3))
        torch.zeros(3).to(META, non_blocking=True)
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.zeros(3, device=META).nonzero()


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.usefixtures("no_autocast")
def test_an_epoch_of_the_basis_study_reads_one_number() -> None:
    recipe = BasisRecipe(4, 8, 0.1, 0.9, 5e-4, crop_padding=1)
    training = ImageTraining(recipe, 2, images(16), "meta")
    model = training.new_network(torch.Generator())
    optimizer = training.new_optimizer(model)
    with Watch() as watch:
        training.train_epoch(model, optimizer, 0, torch.Generator())
    assert training.steps_per_epoch == 3
    assert watch.reads == 1
    with Watch() as watch:
        training.test(model)
    assert watch.reads == 3


@pytest.mark.usefixtures("no_autocast")
def test_an_epoch_of_the_cnn_study_reads_one_number() -> None:
    setting = cnn_preset("quick", "plain").settings[0]
    training = CnnTraining(setting, 0, images(32, 48), "meta", (1, 1, 1))
    with Watch() as watch:
        training.advance(0)
    assert watch.reads == 4  # the training loss, the test's loss and two counts of answers


@pytest.mark.usefixtures("no_autocast")
def test_an_epoch_of_the_scaling_study_reads_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = "growkernels.experiments.scaling.training."
    monkeypatch.setattr(  # the fused AdamW refuses the meta device
        engine + "build_optimizer", lambda recipe, model: torch.optim.SGD(model.parameters(), 0.1)
    )
    setting = preset_setting("paper", 64)
    small = vars(setting.recipe) | {"batch": 8, "erasing": 0.0}  # noise needs a generator there
    setting = type(setting)(
        **vars(setting)
        | {
            "recipe": type(setting.recipe)(**small),
            "architecture": type(setting.architecture)(64, 2, 2, 8, 64),
        }
    )
    run = ScalingTraining(setting, setting.variant("reduced"), 0, images(64).to(META), "meta")
    with Watch() as watch:
        run._train_epoch(0)
    assert run.batches.epoch_images() == 24
    assert watch.reads == 1
