"""A surgery whose new tensors the system has no memory for raises, and leaves model, optimizer and
records bitwise as they were. Run as a program, this file does the surgeries.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from growkernels import checkpoint
from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import convert, separate_attention

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

from limited_memory import ENVIRONMENT, refusals  # noqa: E402

WIDTH = 512  # 1 MiB for a weight: more than the heap has free


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(1)
        y: Tensor = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return y.squeeze(1)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Unflatten(1, (128, 2, 2)),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(1),
        Attending(),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, 3),
    )


def backward(model: nn.Module) -> None:
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(5))
    model(x).square().sum().backward()


def step(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    backward(model)
    optimizer.step()


Surgery = Callable[[], object]


def converting(model: nn.Module, optimizer: Optimizer) -> Surgery:
    return lambda: convert(model, {"1": 48}, optimizer)


def separating(model: nn.Module, optimizer: Optimizer) -> Surgery:
    return lambda: separate_attention(model, optimizer)


def inserting(model: nn.Module, optimizer: Optimizer) -> Surgery:
    driver = LayerInsertion(model, {"6": "linear_relu"})
    with driver.recording():
        backward(model)
    return lambda: driver.insert("6", optimizer)


def widening(model: nn.Module, optimizer: Optimizer) -> Surgery:
    driver = NeuronScaling(
        model, "magnitude", layers=["5"], form="single", depth=False, widen=("fc1",)
    )
    chosen = driver.select(driver.scores(), budget=200_000, min_eligible=1)
    assert chosen.neurons
    return lambda: driver.grow(chosen, optimizer)


def deepening(model: nn.Module, optimizer: Optimizer) -> Surgery:
    driver = NeuronScaling(model, "magnitude", layers=["5"], form="pair")
    chosen = driver.select(driver.scores(), budget=400_000, min_eligible=1)
    assert chosen.neurons
    return lambda: driver.grow(chosen, optimizer)


def rebuilding(model: nn.Module, optimizer: Optimizer) -> Surgery:
    other = network()
    converting(other, torch.optim.SGD(other.parameters()))()
    inserting(other, torch.optim.SGD(other.parameters()))()
    records = insertions(other)
    return lambda: rebuild(model, records, optimizer)


def loading(model: nn.Module, optimizer: Optimizer) -> Surgery:
    """Into a model of its own; this one is what is saved, and stays."""
    folder = tempfile.mkdtemp()
    checkpoint.save(f"{folder}/saved", model, optimizer)
    return lambda: checkpoint.load(
        f"{folder}/saved", network, None, lambda m: torch.optim.AdamW(m.parameters())
    )


SURGERIES = [converting, separating, inserting, widening, deepening, rebuilding, loading]


def digest(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """All bytes, names, classes and records, and which object is where."""
    found: list[Any] = [insertions(model)]
    for path, module in model.named_modules():
        found.append((path, id(module), type(module).__name__, list(module._buffers)))
    tensors = {
        name: tensor
        for name, parameter in model.named_parameters()
        for name, tensor in ((name, parameter), (f"{name}.grad", parameter.grad))
    }
    for number, (parameter, state) in enumerate(optimizer.state.items()):
        found.append((id(parameter), list(state)))
        tensors |= {f"{number}.{key}": value for key, value in state.items()}
    for name, tensor in tensors.items():
        if tensor is not None:
            content = hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()
            found.append((name, id(tensor), tuple(tensor.shape), content))
    found.append([[id(p) for p in group["params"]] for group in optimizer.param_groups])
    return found


def do_all_surgeries() -> dict[str, int]:
    """How often there was no memory for each."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported: every refusal is followed by a collection
    found = {}
    for prepare in SURGERIES:
        print(prepare.__name__, file=sys.stderr, flush=True)  # the last one, should this abort
        model = network()
        optimizer = torch.optim.AdamW(model.parameters())
        step(model, optimizer)
        surgery = prepare(model, optimizer)
        before = digest(model, optimizer)

        def check() -> None:
            gc.collect()
            assert digest(model, optimizer) == before, prepare.__name__  # noqa: B023

        found[prepare.__name__], _ = refusals(surgery, check, factor=2.0)
        assert (digest(model, optimizer) != before) == (prepare is not loading)
        step(model, optimizer)
    return found


def test_model_optimizer_and_records_are_as_before() -> None:
    finished = subprocess.run(
        [sys.executable, __file__],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert len(found) == len(SURGERIES)
    assert [name for name, count in found.items() if count < 2] == []


if __name__ == "__main__":
    print(json.dumps(do_all_surgeries()))
