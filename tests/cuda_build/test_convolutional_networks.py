"""Basis convolutions and inserted layers on torchvision's networks, and on timm's ResNet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from real_models import CLASSES, adamw, change, checkpoint, images, outputs, resnet18, train
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

import growkernels as gk
from growkernels.experiments.models.resnet import resnet18 as our_resnet18
from growkernels.growth import BasisSearch, LayerInsertion, rebuild

# The middle of the network: enough to see every kind of layer exchanged.
PLAN = {"layer2.0.conv1": 0.5, "layer2.0.conv2": 0.5, "layer2.1.conv1": 0.25, "layer3.0.conv2": 64}


def timm_resnet18() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet18", pretrained=False, num_classes=CLASSES)
    return model


def sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.01, momentum=0.9)


def test_resnets_parameters_are_torchvisions() -> None:
    theirs = resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # ours has the stem for CIFAR
    theirs.maxpool = nn.Identity()
    ours = our_resnet18(num_classes=CLASSES)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert change(outputs(theirs), outputs(ours)) <= 1e-5
    theirs.load_state_dict(our_resnet18(num_classes=CLASSES).state_dict(), strict=True)


@pytest.mark.parametrize("build", [resnet18, timm_resnet18])
def test_conversion_keeps_what_a_basis_can_hold(build: Callable[[], nn.Module]) -> None:
    """Kernels of rank R are exchanged for R basis filters without a change."""
    model = build()
    for path, filters in PLAN.items():
        weight = model.get_submodule(path).get_parameter("weight")
        rank = filters if isinstance(filters, int) else round(filters * len(weight))
        with torch.no_grad():
            mixed = torch.randn(len(weight), rank) @ weight[:rank].flatten(1) / rank**0.5
            weight.copy_(mixed.view_as(weight))
    optimizer = sgd(model)
    train(model, optimizer, range(1))
    for path, filters in PLAN.items():  # the step has changed the rank
        weight = model.get_submodule(path).get_parameter("weight")
        rank = filters if isinstance(filters, int) else round(filters * len(weight))
        u, s, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        with torch.no_grad():
            weight.copy_((u[:, :rank] * s[:rank] @ v[:rank]).view_as(weight))
    before = outputs(model)
    untouched = model.get_parameter("layer1.0.conv1.weight")
    state = optimizer.state[untouched]["momentum_buffer"].clone()
    done = gk.nn.convert(model, PLAN, optimizer)
    assert set(done.converted) == set(PLAN)
    assert change(before, outputs(model)) <= 1e-5
    assert torch.equal(optimizer.state[untouched]["momentum_buffer"], state)
    train(model, optimizer, range(1, 2))

    saved = checkpoint(model, optimizer)
    resumed = build()
    gk.nn.convert(resumed, PLAN)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer = sgd(resumed)
    resumed_optimizer.load_state_dict(saved["optimizer"])
    for network, steps in ((model, optimizer), (resumed, resumed_optimizer)):
        train(network, steps, range(2, 3))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_basis_search_plans_and_converts_torchvisions_resnet() -> None:
    model = resnet18()
    layers = [path for path in PLAN if "conv" in path]
    search = BasisSearch(model, fractions=(0.25, 0.5), layers=layers)
    costs = search.sensitivities("taylor", batches=[images(4)], draws=1)
    assert set(costs.costs) == set(layers)
    full = sum(p.numel() for p in model.parameters())
    plan = search.plan(costs, ratio=0.97)
    assert plan
    gk.nn.convert(model, plan, adamw(model))
    assert sum(p.numel() for p in model.parameters()) <= 0.97 * full
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize("network", ["resnet18", "squeezenet1_1"])
def test_layers_are_inserted_into_torchvisions_networks(network: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(torchvision.models, network)(num_classes=CLASSES)
        return model

    model = build()
    optimizer = sgd(model)
    # A block's output is behind a ReLU that its forward applies; a Sequential's ReLU is found.
    named = {"layer1.0": "conv2d_relu", "layer2.1": "conv2d_relu"}
    inserter = LayerInsertion(model, named if network == "resnet18" else None)
    x, y = images(4, 64)
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    merits = inserter.merits()
    assert bool((merits.values > 0).all())
    position = inserter.select(merits)
    assert position is not None
    before = outputs(model, 64)
    new = inserter.insert(position, optimizer, sample=x)
    inserter.close()
    assert isinstance(new, gk.nn.Conv2dReLU)
    assert change(before, outputs(model, 64)) <= 1e-5

    saved = checkpoint(model, optimizer)
    resumed = build()
    rebuild(resumed, saved["insertions"])
    resumed.load_state_dict(saved["model"])
    assert torch.equal(outputs(resumed, 64), outputs(model, 64))
