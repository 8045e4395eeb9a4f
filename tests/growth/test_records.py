"""Records of every surgery: JSON, repeated in order, on the meta device too."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from all_surgeries import SURGERIES, grown, network, outputs
from torch import nn
from torch.distributed import checkpoint as dcp

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import convert, separate_attention


def test_a_mixture_is_rebuilt_in_order() -> None:
    model = grown(network())
    records = insertions(model)
    assert [record["kind"] for record in records] == [
        "separate_attention",
        "linear_relu",
        "neurons",
        "conversion",
        "neurons",
        "neurons",
        "residual",
        "conversion",
    ]
    assert all(record["version"] == 1 for record in records)
    text = json.dumps(records)
    assert json.loads(text) == records
    resumed = network(seed=5)
    rebuild(resumed, text)
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(outputs(resumed), outputs(model))
    assert insertions(resumed) == records


@pytest.mark.parametrize("assign", [True, False])
def test_on_the_meta_device(assign: bool) -> None:
    model = grown(network())
    with torch.device("meta"):
        resumed = network()
    rebuild(resumed, insertions(model))
    assert all(p.is_meta for p in resumed.parameters())
    if assign:
        resumed.load_state_dict(model.state_dict(), assign=True)
    else:
        resumed.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(outputs(resumed), outputs(model))
    for (name, a), (_, b) in zip(model.named_buffers(), resumed.named_buffers(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("surgery", SURGERIES)
def test_memory_without_values_is_no_obstacle(surgery: str) -> None:
    model = network()
    SURGERIES[surgery](model, None)
    resumed = network()
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.fill_(float("nan"))
    rebuild(resumed, insertions(model))
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(outputs(resumed), outputs(model))


def recorded_insertion(model: nn.Module) -> Callable[[], dict[str, Any]]:
    inserter = LayerInsertion(model, {"mlp.1": "linear_relu"})
    with inserter.recording():
        outputs(model, grad=True).sum().backward()
    model.zero_grad()
    return lambda: inserter.record("mlp.1")


def recorded_growth(model: nn.Module) -> Callable[[], dict[str, Any]]:
    scaling = NeuronScaling(model, "magnitude", layers=["mlp.0"], form="gated")
    chosen = scaling.select(scaling.scores(), budget=40, min_eligible=1)
    return lambda: scaling.record(chosen, scale=0.5)


def recorded_conversion(model: nn.Module) -> Callable[[], dict[str, Any]]:
    return lambda: convert(model, {"convs.0": 1}, record_only=True).record or {}


def recorded_separation(model: nn.Module) -> Callable[[], dict[str, Any]]:
    return lambda: separate_attention(model, record_only=True).record


@pytest.mark.parametrize(
    "prepare", [recorded_insertion, recorded_growth, recorded_conversion, recorded_separation]
)
def test_what_would_be_done(
    prepare: Callable[[nn.Module], Callable[[], dict[str, Any]]],
) -> None:
    model = network()
    record_of = prepare(model)
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    values = copy.deepcopy(model.state_dict())
    record = record_of()
    assert before == [(name, id(module), type(module)) for name, module in model.named_modules()]
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    assert insertions(model) == []
    assert json.loads(json.dumps(record)) == record
    rebuild(model, record)
    assert insertions(model) == [record]
    assert len(list(model.modules())) != len(before) or record["kind"] == "conversion"


def test_an_exchange_that_the_builder_made_is_not_repeated() -> None:
    """How attention was separated before records knew of it."""
    model = network()
    separate_attention(model)
    SURGERIES["insert"](model, None)
    resumed = network()
    separate_attention(resumed)
    rebuild(resumed, insertions(model))
    resumed.load_state_dict(model.state_dict())
    assert insertions(resumed) == insertions(model)


def test_records_from_before_versions() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    width = {"layer": "0", "role": "fc1", "follower": "2", "heads": 1, "neurons": 2}
    old = [
        {"kind": "neurons", "form": "pair", "gain": 2.0, "depth": {"2": [1]}, "width": [width]},
        {"position": "1", "kind": "linear_relu", "width": 5, "activation": "tanh", "scale": 0.8},
    ]
    x = torch.randn(4, 3)
    before = model(x)
    rebuild(model, old)
    torch.testing.assert_close(model(x), before)
    assert insertions(model) == old


@pytest.mark.parametrize(
    ("records", "error", "message"),
    [
        ("[{", ValueError, "is no JSON"),
        (7, TypeError, "The growth records are a int"),
        (["x"], TypeError, "The growth records are a list"),
        ([{"position": "0"}], ValueError, "Record 0 of the growth has no 'kind'"),
        ({"kind": "melted"}, ValueError, "Record 0 of the growth is of the unknown kind 'melted'"),
        ({"kind": "neurons", "version": 9}, ValueError, "is of version 9, and this growkernels"),
        (
            {"kind": "conversion", "plan": {"convs.0": 4}, "init": "svd"},
            ValueError,
            "The record converts 'convs.0' to 4 filters, which this model does not need",
        ),
        (
            {"kind": "separate_attention", "paths": ["mlp"]},
            ValueError,
            "The record separates the attention at 'mlp', which this model cannot: there is none",
        ),
    ],
)
def test_records_that_are_refused(records: Any, error: type[Exception], message: str) -> None:
    model = network()
    with pytest.raises(error, match=message):
        rebuild(model, records)
    assert insertions(model) == []


def test_text_survives_a_distributed_checkpoint(tmp_path: Path) -> None:
    model = grown(network())
    dcp.save({"growth": json.dumps(insertions(model))}, checkpoint_id=tmp_path / "c", no_dist=True)
    loaded = {"growth": ""}
    dcp.load(loaded, checkpoint_id=tmp_path / "c", no_dist=True)
    resumed = network()
    rebuild(resumed, loaded["growth"])
    assert insertions(resumed) == insertions(model)


def test_a_grown_model_keeps_no_values_in_its_records() -> None:
    model = network()
    scaling = NeuronScaling(model, layers=["mlp.0"], form="gated")
    with scaling.recording():
        outputs(model, grad=True).square().sum().backward()
    chosen = scaling.select(scaling.scores(), budget=100, min_eligible=1)
    record = scaling.record(chosen, init="eigenvector")
    assert json.loads(json.dumps(record)) == record
    scaling.grow(chosen, init="eigenvector")
    assert insertions(model) == [{k: v for k, v in record.items() if k != "values"}]
    file = io.BytesIO()
    torch.save(insertions(model), file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == insertions(model)
