"""GPT-2's Conv1D as linear layers, which grow and are widened."""

from __future__ import annotations

import copy
from typing import Any

import networks
import pytest
import torch
from networks import loss_of, outputs_of
from torch import Tensor, nn

from growkernels.growth import (
    LayerInsertion,
    NeuronScaling,
    describe,
    grow_state,
    insertions,
    rebuild,
)
from growkernels.nn import linear_from_conv1d

CONV1D = [
    f"transformer.h.{block}.{layer}"
    for block in range(2)
    for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


def gpt2() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    model, sample = networks.build("gpt2")
    return model, sample, torch.optim.AdamW(model.parameters(), lr=1e-3)


def step(model: nn.Module, sample: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model, sample).backward()
    optimizer.step()


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=2e-6 * float(b.abs().max()))


def test_the_model_computes_and_trains_as_before() -> None:
    model, sample, optimizer = gpt2()
    step(model, sample, optimizer)
    other, _, other_optimizer = gpt2()
    step(other, sample, other_optimizer)
    saved = copy.deepcopy(other.state_dict())
    record = linear_from_conv1d(other, other_optimizer, record_only=True).record
    assert type(other.get_submodule(CONV1D[0])) is not nn.Linear
    done = linear_from_conv1d(other, other_optimizer)
    assert list(done.exchanged) == CONV1D
    assert done.record == record
    assert done.skipped == {}
    assert all(type(other.get_submodule(path)) is nn.Linear for path in CONV1D)
    assert close(outputs_of(other, sample), outputs_of(model, sample))
    layer, old = other.get_submodule(CONV1D[2]), model.get_submodule(CONV1D[2])
    assert torch.equal(layer.weight.grad, old.weight.grad.T)
    moment = other_optimizer.state[layer.weight]["exp_avg_sq"]
    assert torch.equal(moment, optimizer.state[old.weight]["exp_avg_sq"].T)
    grown, _ = grow_state(record, saved, build=lambda: gpt2()[0])
    assert all(torch.equal(grown[name], value) for name, value in other.state_dict().items())
    for _ in range(2):
        step(model, sample, optimizer)
        step(other, sample, other_optimizer)
    assert torch.allclose(outputs_of(other, sample), outputs_of(model, sample), atol=1e-4)


def test_mlps_are_widened_and_neurons_grow() -> None:
    model, sample, optimizer = gpt2()
    found = describe(model, sample)
    for path in CONV1D:
        assert found.why_not(path)["grow"].endswith("see gk.nn.linear_from_conv1d")
    linear_from_conv1d(model, optimizer)
    found = describe(model, sample)
    assert set(found.possible("grow")) == set(CONV1D)
    assert {path: way.partition(",")[0] for path, way in found.possible("widen").items()} == {
        "transformer.h.0.mlp.c_fc": "fc1",
        "transformer.h.1.mlp.c_fc": "fc1",
    }
    step(model, sample, optimizer)
    before = outputs_of(model, sample)
    scaling = NeuronScaling(model, widen=("fc1",), depth=False, sample=sample, layers=["*.c_fc"])
    with scaling.recording():
        loss_of(model, sample).backward()
    chosen = scaling.select(scaling.scores(), budget=400, min_eligible=1)
    scaling.grow(chosen, optimizer)
    scaling.close()
    assert sum(p.numel() for p in model.parameters()) > sum(
        p.numel() for p in gpt2()[0].parameters()
    )
    assert close(outputs_of(model, sample), before)
    inserter = LayerInsertion(model, sample=sample)  # a block of linear layers is copied too
    with inserter.recording():
        loss_of(model, sample).backward()
    assert inserter.merits().values.gt(0).all()
    inserter.insert("transformer.h.1", optimizer)
    assert close(outputs_of(model, sample), before)
    step(model, sample, optimizer)
    again, _, _ = gpt2()
    rebuild(again, insertions(model))
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(again, sample), outputs_of(model, sample))


def test_what_is_left_alone_or_refused() -> None:
    with pytest.raises(ValueError, match=r"no Conv1D of transformers to exchange\."):
        linear_from_conv1d(nn.Sequential(nn.Linear(2, 2)))
    model, _, _ = gpt2()
    hooked = model.get_submodule(CONV1D[0])
    hooked.register_forward_hook(lambda *_: None)
    done = linear_from_conv1d(model)
    assert CONV1D[0] in done.skipped
    assert "hooks" in done.skipped[CONV1D[0]]
    assert type(hooked) is not nn.Linear
    model, _, _ = gpt2()
    with pytest.raises(ValueError, match="The optimizer holds no parameter of the model"):
        linear_from_conv1d(model, torch.optim.SGD([nn.Parameter(torch.zeros(2))]))
