"""`growkernels grow`: a checkpoint's file grows as the live run does."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from all_surgeries import Network, inserter_at, network, train
from torch import nn
from torch.optim import Optimizer
from training import check_equal

from growkernels import cli
from growkernels.growth import insertions
from growkernels.growth.offline import grow_file
from growkernels.nn import convert


def checkpoint_of(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "insertions": insertions(model),
            "step": 7,
        }
    )


def build() -> Network:
    with torch.device("meta"):
        return network()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["growkernels", *arguments])
    try:
        return cli.main()
    except SystemExit as ended:
        return ended.code


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: nn.Module = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer)
    convert(model, {"convs.0": 1}, optimizer)
    train(model, optimizer)
    inserter = inserter_at(model, "mlp.1", "linear_relu")
    record = tmp_path / "growth.json"
    record.write_text(json.dumps([inserter.record("mlp.1")]))
    torch.save(checkpoint_of(model, optimizer), tmp_path / "checkpoint.pt")
    inserter.insert("mlp.1", optimizer)
    out = tmp_path / "grown.pt"
    arguments = ["grow", str(tmp_path / "checkpoint.pt"), "--record", str(record), "-o", str(out)]
    assert command(monkeypatch, *arguments, "--build", "test_offline:build") == 0
    assert "grown.pt: 320 numbers in the model's state before, 362 after" in capsys.readouterr().out
    grown, expected = torch.load(out, weights_only=True), checkpoint_of(model, optimizer)
    for key in expected:
        same = dict if key in ("model", "optimizer") else lambda entry: entry
        check_equal(same(grown[key]), same(expected[key]))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "grown.pt",
        "growth.json",
    ]
    assert command(monkeypatch, *arguments, "--build", "test_offline:none") == 1
    assert "--build is 'test_offline:none'; give MODULE:FUNCTION" in capsys.readouterr().err


def test_a_bare_state_dict(tmp_path: Path) -> None:
    model = network()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    record = convert(model, {"convs.0": 1}).record
    assert record is not None
    grow_file(tmp_path / "model.pt", record, tmp_path / "grown.pt", build)
    grown = torch.load(tmp_path / "grown.pt", weights_only=True)
    check_equal(dict(grown), dict(model.state_dict()))


def test_what_fails_leaves_no_file(tmp_path: Path) -> None:
    record = {"kind": "linear_relu", "position": "nowhere", "width": 6, "activation": "tanh"}
    record["scale"] = 0.8
    torch.save(network().state_dict(), tmp_path / "model.pt")
    torch.save({"weights": network().state_dict()}, tmp_path / "other.pt")
    torch.save([1], tmp_path / "list.pt")
    for name, message in (
        ("model.pt", "There is no module at 'nowhere'"),
        ("other.pt", "has no state dict under 'model'; its entries are 'weights'"),
        ("list.pt", "holds a list; a model's state dict is needed"),
    ):
        with pytest.raises(ValueError, match=message):
            grow_file(tmp_path / name, record, tmp_path / "grown.pt", build)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["list.pt", "model.pt", "other.pt"]
