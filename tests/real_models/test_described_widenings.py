"""What `describe` says can be widened is widened: same function, training goes on, records."""

from __future__ import annotations

import copy

import networks
import pytest
import torch
from networks import loss_of, outputs_of

from growkernels.growth import NeuronScaling, describe, insertions, rebuild

WIDENED = ("resnet18", "mobilenet", "timm_deit", "llama", "bert")


@pytest.mark.parametrize("name", WIDENED)
def test_every_widening_that_is_found_keeps_the_function(name: str) -> None:
    model, sample = networks.build(name)
    base = copy.deepcopy(model)
    found = describe(model, sample).possible("widen")
    roles = sorted({way.partition(",")[0] for way in found.values()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of(model.train(), sample).backward()
    optimizer.step()
    scaling = NeuronScaling(
        model, "random", kinds=("linear", "conv2d"), depth=False, widen=roles, sample=sample
    )
    assert set(scaling.layers) == set(found)
    chosen = scaling.select(scaling.scores(), budget=10**6, min_eligible=1)
    assert set(chosen.neurons) == set(found)
    before = outputs_of(model, sample)
    scaling.grow(chosen, optimizer)
    after = outputs_of(model, sample)
    assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model.train(), sample).backward()
        optimizer.step()
    rebuild(base, insertions(model))
    base.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(base, sample), outputs_of(model, sample))
