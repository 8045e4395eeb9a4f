"""The merit pass as the SensLI authors organise it: the opponent of the op and the driver.

Their code builds the fully extended network, with a real identity layer at every candidate
position, runs a forward and backward of it over the whole loader, copies every virtual gradient to
the host after each batch, and there adds them up and takes squared norms. What their code also
does per step and this does not: reading each sample from a file of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from growkernels.experiments.models.batched import RESIDUAL_SCALE


class _VirtualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.inner.weight.copy_(RESIDUAL_SCALE * torch.eye(width, device="cpu"))
            self.inner.bias.zero_()
            self.outer.weight.zero_()

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.inner(h)) @ self.outer.weight.T


def _virtual_layer(kind: str, width: int) -> tuple[nn.Module, Tensor]:
    """An identity layer and its parameter whose gradient counts."""
    if kind == "residual":
        block = _VirtualBlock(width)
        return block, block.outer.weight
    layer: nn.Linear | nn.Conv2d
    if kind == "linear_relu":
        layer = nn.Linear(width, width)
        nn.init.eye_(layer.weight)
    elif kind == "conv2d_relu":
        layer = nn.Conv2d(width, width, 3, padding=1)
        nn.init.dirac_(layer.weight)
    else:
        raise ValueError(f"Unknown kind {kind!r}; choose linear_relu, residual or conv2d_relu.")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, nn.ReLU()), layer.weight


class ExtendedNetwork:
    """A copy of ``model`` with a virtual layer behind each position.

    ``positions`` maps module paths to the number of features or channels there; ``kind`` is
    "linear_relu", "residual" or "conv2d_relu". Parameters stay on the model's device and dtype.
    """

    def __init__(self, model: nn.Module, positions: Mapping[str, int], kind: str) -> None:
        self.model = copy.deepcopy(model)
        like = next(self.model.parameters())
        self.virtual: list[Tensor] = []
        for path, width in positions.items():
            layer, weight = _virtual_layer(kind, width)
            layer.to(device=like.device, dtype=like.dtype)
            parent_path, _, name = path.rpartition(".")
            parent = self.model.get_submodule(parent_path)
            setattr(parent, name, nn.Sequential(self.model.get_submodule(path), layer))
            self.virtual.append(weight)

    def merits(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        loss: Callable[[Tensor, Tensor], Tensor],
    ) -> list[float]:
        """Squared Frobenius norms of the batch-averaged virtual gradients, in position order."""
        totals = [torch.zeros(w.shape, dtype=w.dtype, device="cpu") for w in self.virtual]
        count = 0
        for inputs, targets in batches:
            self.model.zero_grad()
            loss(self.model(inputs), targets).backward()
            for total, weight in zip(totals, self.virtual, strict=True):
                assert weight.grad is not None
                total += weight.grad.detach().cpu()
            count += 1
        return [(total / count).pow(2).sum().item() for total in totals]
