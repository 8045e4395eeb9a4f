"""NeuronScaling on timm's DeiT and torchvision's ViT, packed attention included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from real_models import (
    CLASSES,
    adamw,
    change,
    checkpoint,
    deit_small,
    images,
    outputs,
    small_timm_vit,
    small_torchvision_vit,
    train,
)
from torch import nn
from torch.nn import functional as F

import growkernels as gk
from growkernels.experiments.models.deit import deit, split_qkv
from growkernels.growth import NeuronScaling, insertions, rebuild

BUILDS = [small_timm_vit, small_torchvision_vit]
Build = Callable[[], nn.Module]


def record(scaling: NeuronScaling, pixels: int = 32) -> None:
    x, y = images(4, pixels, seed=2)
    with scaling.recording():
        F.cross_entropy(scaling.model(x), y).backward()


def separated(build: Build) -> Build:
    def built() -> nn.Module:
        model = build()
        gk.nn.separate_attention(model)
        return model

    return built


def test_the_whole_deit_small_is_recorded_and_grown() -> None:
    model = deit_small()
    before = outputs(model, 224)
    scaling = NeuronScaling(model, "gradient_sum")
    kinds = {name.split(".", 2)[-1] for name in scaling.layers}
    assert kinds == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert len(scaling.layers) == 12 * 4
    record(scaling, 224)
    optimizer = adamw(model)
    chosen = scaling.select(scaling.scores(), budget=500_000)
    scaling.grow(chosen, optimizer)
    assert sum(p.numel() for p in model.parameters()) == 21_669_514 + chosen.parameters
    assert 400_000 < chosen.parameters <= 500_000
    assert change(before, outputs(model, 224)) <= 1e-5
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in model.parameters()
    }


def test_deit_smalls_own_neurons_have_eigenpairs() -> None:
    scaling = NeuronScaling(deit_small(depth=2), rows=64, layers=["blocks.0.*"])
    record(scaling, 224)
    scores = scaling.scores()
    sizes = {name: len(values) for name, values in scores.values.items()}
    assert sizes == {
        "blocks.0.attn.qkv": 3 * 384,
        "blocks.0.attn.proj": 384,
        "blocks.0.mlp.fc1": 1536,
        "blocks.0.mlp.fc2": 384,
    }
    assert all(bool((values < 0).any()) for values in scores.values.values())
    assert all(float(residual.max()) <= 1e-3 for residual in scores.residuals.values())


@pytest.mark.parametrize("build", BUILDS)
def test_separated_attention_computes_the_same(build: Build) -> None:
    model = build()
    before = outputs(model)
    done = gk.nn.separate_attention(model)
    assert len(done.exchanged) == 2
    assert not done.skipped
    assert change(before, outputs(model)) <= 1e-5


@pytest.mark.parametrize("build", BUILDS)
def test_training_goes_on_after_separation(build: Build) -> None:
    model, twin = build(), build()
    optimizer, twins_optimizer = adamw(model), adamw(twin)
    for network, steps in ((model, optimizer), (twin, twins_optimizer)):
        network.double()
        for seed in range(2):
            _step(network, steps, seed)
    gk.nn.separate_attention(model, optimizer)
    for network, steps in ((model, optimizer), (twin, twins_optimizer)):
        _step(network, steps, 3)
    x = images(4, seed=9)[0].double()
    torch.testing.assert_close(model(x), twin(x), rtol=1e-8, atol=1e-8)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = images(seed=seed)
    optimizer.zero_grad()
    F.cross_entropy(model(x.double()), y).backward()
    optimizer.step()


def test_packed_attention_grows_as_far_as_it_has_layers() -> None:
    names = {name.rpartition(".")[2] for name in NeuronScaling(small_timm_vit()).layers}
    assert names == {"qkv", "proj", "fc1", "fc2"}
    scaling = NeuronScaling(small_torchvision_vit())
    assert {name.partition("mlp.")[2] for name in scaling.layers} == {"0", "3"}
    assert any("out_proj" in name for name in scaling.left_out)
    with pytest.raises(ValueError, match="separate_attention"):
        NeuronScaling(small_timm_vit(), widen=("v",))


@pytest.mark.parametrize("criterion", ["splitting", "s2d"])
@pytest.mark.parametrize("build", [*BUILDS, *map(separated, BUILDS)])
def test_growth_keeps_the_function_and_resumes_with_the_same_bits(
    build: Build, criterion: str
) -> None:
    model = build()
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    old = {p: dict(optimizer.state[p]) for p in model.parameters()}
    has_own = any(isinstance(module, gk.nn.Attention) for module in model.modules())
    widen = ("fc1", "v", "qk") if has_own and criterion == "splitting" else ("fc1",)
    for budget in (3000, 3000):
        before = outputs(model)
        scaling = NeuronScaling(model, criterion, widen=widen)
        record(scaling)
        chosen = scaling.select(scaling.scores(), budget, min_eligible=1)
        size = sum(p.numel() for p in model.parameters())
        scaling.grow(chosen, optimizer, sample=images(2)[0])
        scaling.close()
        assert sum(p.numel() for p in model.parameters()) == size + chosen.parameters > size
        assert change(before, outputs(model)) <= 1e-5
    kept = [p for p in model.parameters() if p in old]
    assert kept
    for parameter in kept:
        assert torch.equal(optimizer.state[parameter]["exp_avg"], old[parameter]["exp_avg"])
    train(model, optimizer, range(2, 4))
    saved = checkpoint(model, optimizer)
    resumed = build()
    rebuild(resumed, saved["insertions"])
    resumed.load_state_dict(saved["model"])
    resumed_optimizer = adamw(resumed)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert insertions(resumed) == insertions(model)
    for network, steps in ((model, optimizer), (resumed, resumed_optimizer)):
        train(network, steps, range(4, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_deits_parameters_are_timms() -> None:
    theirs = deit_small(depth=2).eval()
    ours = deit(depth=2, classes=CLASSES).eval()
    ours.load_state_dict(split_qkv(theirs.state_dict()), strict=True)
    assert change(outputs(theirs, 224), outputs(ours, 224)) <= 1e-5
    gk.nn.separate_attention(theirs)
    again = deit(depth=2, classes=CLASSES)
    theirs.load_state_dict(again.state_dict(), strict=True)
    assert [n for n, _ in theirs.named_parameters()] != []
    assert change(outputs(theirs, 224), outputs(again, 224)) <= 1e-5
