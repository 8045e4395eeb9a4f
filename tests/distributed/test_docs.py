"""The snippets of docs/more_than_one_process.md, executed in two processes."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from small_networks import batches, mlp
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import growkernels as gk

PAGE = Path(__file__).parents[2] / "docs" / "more_than_one_process.md"
pytestmark = pytest.mark.filterwarnings("ignore")


def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def names(rank: int) -> dict[str, Any]:
    model = mlp(dtype=torch.float32)
    data = batches(model, 4, 8)
    return {
        "torch": torch,
        "gk": gk,
        "model": model,
        "batches": data[rank::2],
        "loss_fn": F.cross_entropy,
        "make_optimizer": lambda module: torch.optim.Adam(module.parameters()),
    }


def page(rank: int) -> dict[str, Any]:
    insertion, neurons, group, sharded, _, restart = snippets()
    here = names(rank)
    exec(insertion, here)
    exec(neurons, here)
    told = {"records": gk.growth.insertions(here["model"])}
    exec(group, {**here, "group": distributed.group.WORLD})

    def shard(module: nn.Module) -> None:
        for layer in module:  # type: ignore[attr-defined]
            if list(layer.parameters()):
                fully_shard(layer)
        fully_shard(module)

    exec(restart, {**here, "build": lambda: mlp(dtype=torch.float32)})
    there = {**names(rank), "shard": shard, "build": lambda: mlp(dtype=torch.float32)}
    shard(there["model"])
    there["optimizer"] = there["make_optimizer"](there["model"])
    exec(sharded, there)
    told["sharded"] = gk.growth.insertions(there["model"])
    return told


def test_snippets_run(tmp_path: Path) -> None:
    mine, other = on_ranks({"page": page}, 2, tmp_path)["page"]
    assert mine == other
    assert [record["kind"] for record in mine["records"]] == ["linear_relu", "neurons"]
    assert len(mine["sharded"]) == 1


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning")
def test_the_trainers_snippet_runs() -> None:
    import lightning.pytorch
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        here = {
            "gk": gk,
            "lightning": lightning,
            "lightning_module": module,
            "loader": DataLoader(TensorDataset(*batches(mlp(), 1, 32)[0]), batch_size=4),
            "settings": {"default_root_dir": folder, "accelerator": "cpu", **quiet},
        }
        exec(snippets()[4], here)
    assert len(gk.growth.insertions(module.net)) == 2
