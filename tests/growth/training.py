"""Training, recording and resuming, for the tests of all drivers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild

Batches = Sequence[tuple[Tensor, Tensor]]


def random_batches(
    model: nn.Module, count: int, size: int, shape: tuple[int, ...], classes: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """(inputs [size, *shape] in the model's dtype, class indices)."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    return [
        (
            torch.randn(size, *shape, generator=generator, dtype=dtype),
            torch.randint(0, classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def train(model: nn.Module, optimizer: Optimizer, data: Batches) -> None:
    """One step for each batch."""
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def record(
    driver: LayerInsertion | NeuronScaling, data: Batches, called: nn.Module | None = None
) -> None:
    """Let a driver see the batches; the model's .grad is as before.

    ``called`` is what the model is wrapped in, if it is.
    """
    grads = [parameter.grad for parameter in driver.model.parameters()]
    driver.model.zero_grad()
    for x, y in data:
        with driver.recording():
            F.cross_entropy((called or driver.model)(x), y).backward()
    for parameter, grad in zip(driver.model.parameters(), grads, strict=True):
        parameter.grad = grad


def adamw(model: nn.Module) -> Optimizer:
    """With groups for weights, which decay, and for biases."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2
    )


def check_that_training_resumes(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: StepLR,
    build: Callable[[], nn.Module],
    build_optimizer: Callable[[nn.Module], Optimizer],
    data: Batches,
    look_at: Callable[[nn.Module], None] = lambda resumed: None,
) -> None:
    """Training from a checkpoint of the grown model gives the same bits as training it on.

    The optimizer may be built before the rebuild or after it: its order is the same.
    """
    file = io.BytesIO()
    torch.save(
        {
            "insertions": insertions(model),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        },
        file,
    )
    train(model, optimizer, data)
    for optimizer_first in (True, False):
        file.seek(0)
        checkpoint = torch.load(file, weights_only=True)  # anew: an optimizer keeps its tensors
        resumed = build()
        if optimizer_first:
            resumed_optimizer = build_optimizer(resumed)
            rebuild(resumed, checkpoint["insertions"], resumed_optimizer)
        else:
            rebuild(resumed, checkpoint["insertions"])
            resumed_optimizer = build_optimizer(resumed)
        resumed_scheduler = StepLR(resumed_optimizer, scheduler.step_size, scheduler.gamma)
        resumed.load_state_dict(checkpoint["model"])
        resumed_optimizer.load_state_dict(checkpoint["optimizer"])
        resumed_scheduler.load_state_dict(checkpoint["scheduler"])
        assert insertions(resumed) == insertions(model)
        look_at(resumed)
        train(resumed, resumed_optimizer, data)
        for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(a, b)


def check_equal(a: Any, b: Any, at: str = "") -> None:
    """The same keys, the same bits."""
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            check_equal(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            check_equal(x, y, f"{at}/{number}")
    elif isinstance(a, Tensor):
        assert (a.dtype, a.device) == (b.dtype, b.device), at
        assert torch.equal(a, b), at
    else:
        assert a == b, at
