"""Real models widened through what stands between their layers: function, training, records."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, loss_of, outputs_of
from torch import nn

from growkernels.growth import NeuronScaling, insertions, rebuild

# How many layers can be widened, by role: written down, not asked for.
FOUND: dict[str, dict[str, int]] = {
    "resnet18": {"conv": 8},
    "resnet50": {"conv": 33},  # the stem too, which two layers read
    "mobilenet": {"conv": 11, "fc1": 1},
    "timm_efficientnet": {"conv": 16},
    "convnext": {"fc1": 4},
    "torchvision_vit": {"fc1": 2},
    "timm_deit": {"fc1": 2},
    "timm_swin": {"fc1": 4},
    "timm_convnext": {"fc1": 5},
    "gpt2": {"fc1": 2},
    "llama": {"gated": 2},
    "hf_vit": {"fc1": 2},
    "bert": {"fc1": 3},  # the pooler too
}


@pytest.mark.parametrize("name", FOUND)
def test_widened(name: str) -> None:
    torch.manual_seed(0)
    base, sample = NETWORKS[name]()
    model = copy.deepcopy(base).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, sample).backward()
        optimizer.step()
    scaling = NeuronScaling(
        model,
        "magnitude",
        kinds=("linear", "conv2d"),
        widen=tuple(FOUND[name]),
        depth=False,
        sample=sample,
    )
    assert len(scaling.layers) == sum(FOUND[name].values())
    before = outputs_of(model, sample)
    # What every layer can grow by at least, and some more.
    budget = sum(p.numel() for p in model.parameters()) / 4
    chosen = scaling.select(scaling.scores(), budget, 1)
    assert len(chosen.neurons) > 1
    scaling.grow(chosen, optimizer)
    scaling.close()
    for a, b in zip(outputs_of(model, sample), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, sample).backward()
        optimizer.step()
    for path, p in model.named_parameters():
        assert bool(p.isfinite().all())
        assert p.grad is None or not p.grad.any() or not torch.equal(p, old[path])
    twin = copy.deepcopy(base).eval()
    rebuild(twin, insertions(model))
    twin.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for a, b in zip(outputs_of(twin, sample), outputs_of(model, sample), strict=True):
            assert torch.equal(a, b)
            assert bool(a.isfinite().all())


@pytest.mark.parametrize("name", ["hf_vit", "bert", "timm_deit", "gpt2"])
def test_gradmax_and_tiny(name: str) -> None:
    torch.manual_seed(0)
    model, sample = NETWORKS[name]()
    model.eval()
    before, loss = outputs_of(model, sample), float(loss_of(model, sample))
    for criterion in ("gradmax", "tiny"):
        scaling = NeuronScaling(model, criterion, widen=("fc1",), depth=False, sample=sample)
        assert len(scaling.layers) == FOUND[name]["fc1"]
        for _ in range(2):
            with scaling.recording():
                loss_of(model, sample).backward()
        chosen = scaling.select(scaling.scores(), 400, 1)
        assert chosen
        if criterion == "gradmax":
            scaling.grow(chosen, init="gradmax", sample=sample)
            for a, b in zip(outputs_of(model, sample), before, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:

            def measured(candidate: nn.Module) -> float:
                with torch.no_grad():
                    return float(loss_of(candidate, sample))

            scaling.grow(chosen, init="tiny", loss=measured)
            assert float(loss_of(model, sample)) < loss
        scaling.close()
