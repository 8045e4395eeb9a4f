"""Growth inside Lightning's Trainer is that of a loop written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning_networks import ROWS, STEPS, Classifier, loader, make_optimizer, rows, trainer
from small_networks import mlp
from torch import Tensor, nn
from torch.nn import functional as F

import growkernels as gk
from growkernels.growth import FixedStep, LayerInsertion, NeuronScaling, insertions
from growkernels.integrations.lightning import Grow

pytestmark = pytest.mark.filterwarnings("ignore")


def by_hand(grow_after: dict[int, int]) -> nn.Module:
    """Record in the steps named, and insert after those that they name."""
    model = mlp()
    optimizer, scheduler = make_optimizer(model)
    x, y = rows()
    inserter = LayerInsertion(model)
    for step in range(1, STEPS + 1):
        part = slice((step - 1) * ROWS, step * ROWS)
        optimizer.zero_grad()
        if any(first <= step <= last for first, last in grow_after.items()):
            with inserter.recording():
                F.cross_entropy(model(x[part]), y[part]).backward()
        else:
            F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        scheduler.step()
        if step in grow_after.values():
            position = inserter.select(inserter.merits())
            assert position is not None
            inserter.insert(position, optimizer)
    return model


def check_equal(first: nn.Module, second: nn.Module) -> None:
    assert insertions(first) == insertions(second)
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def fit(folder: Path, callbacks: list[Any], steps: int = STEPS, **settings: Any) -> Classifier:
    model = Classifier()
    path, size = settings.pop("ckpt_path", None), settings.pop("rows_per_batch", ROWS)
    trainer(folder, callbacks, steps, **settings).fit(model, loader(size), ckpt_path=path)
    return model


def test_it_grows_as_a_loop_does(tmp_path: Path) -> None:
    grow = Grow(FixedStep([2, 7]), batches=2, module="net")
    model = fit(tmp_path, [grow])
    assert grow.grown == [4, 9]
    check_equal(model.net, by_hand({3: 4, 8: 9}))
    for module in model.modules():
        assert not module._forward_hooks


def test_neurons_grow_under_accumulation(tmp_path: Path) -> None:
    def driver(module: nn.Module) -> NeuronScaling:
        return NeuronScaling(module, generator=torch.Generator().manual_seed(0))

    grow = Grow(FixedStep([1]), driver, batches=2, budget=60, min_eligible=1, module="net")
    model = fit(tmp_path, [grow], steps=STEPS // 2, accumulate_grad_batches=2)
    assert grow.grown == [2]
    assert [record["kind"] for record in insertions(model.net)] == ["neurons"]


@pytest.mark.parametrize("averaging", [False, True], ids=["plain", "averaged"])
def test_a_killed_run_resumes_with_the_same_numbers(tmp_path: Path, averaging: bool) -> None:
    def callbacks(folder: str) -> list[Any]:
        average = [EMAWeightAveraging(decay=0.5)] if averaging else []
        saving = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        return [saving, *average, Grow(FixedStep([2, 7]), module="net")]

    # Whole epochs, for a plain DataLoader begins anew where a run was killed.
    epochs = {"enable_checkpointing": True, "rows_per_batch": ROWS * STEPS}
    undisturbed = fit(tmp_path, callbacks("one"), **epochs)
    for last in (2, 5):  # between the trigger and the growth, and after a growth
        resumed = fit(
            tmp_path,
            callbacks(f"resumed{last}"),
            **epochs,
            ckpt_path=str(tmp_path / "one" / f"step={last}.ckpt"),
        )
        check_equal(resumed.net, undisturbed.net)


def test_copies_grow_along(tmp_path: Path) -> None:
    copy = Classifier()
    grow = gk.integrations.lightning.Grow(FixedStep([2]), module="net", copies=[copy])
    model = fit(tmp_path, [grow])
    assert insertions(copy.net) == insertions(model.net) != []
    x = torch.randn(3, 2, dtype=torch.float64)
    expected: Tensor = Classifier()(x)
    torch.testing.assert_close(copy(x), expected)
