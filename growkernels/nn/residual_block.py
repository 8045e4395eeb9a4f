"""The residual block of SensLI's ResNets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from growkernels.ops.activations import ACTIVATIONS


class ResidualBlock(nn.Module):
    """h + W2 act(W1 h + b) for h [..., width] (SensLI, arXiv 2311.15995; W2 has no bias).

    ``linear1`` holds W1 and b, ``linear2`` holds W2, both [width, width] with nn.Linear's default
    initial values. ``activation`` is one of ``"tanh"``, ``"relu"``, ``"gelu"`` (the erf form),
    ``"silu"``, ``"sigmoid"``.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(
        self,
        width: int,
        activation: str = "tanh",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Unknown activation {activation!r}; choose one of {', '.join(ACTIVATIONS)}."
            )
        self.width = width
        self.activation = activation
        self.linear1 = nn.Linear(width, width, device=device, dtype=dtype)
        self.linear2 = nn.Linear(width, width, bias=False, device=device, dtype=dtype)

    @classmethod
    def identity(
        cls,
        width: int,
        activation: str = "tanh",
        *,
        scale: float = 0.8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ResidualBlock:
        """A block with W1 = scale * I, b = 0, W2 = 0: the identity, with a gradient in W2 alone."""
        block = cls(width, activation, device="meta", dtype=dtype)
        block = block.to_empty(device=device or torch.get_default_device())
        with torch.no_grad():  # nn.init.eye_ makes a matrix on the default device
            nn.init.zeros_(block.linear1.weight).fill_diagonal_(scale)
            nn.init.zeros_(block.linear1.bias)
            nn.init.zeros_(block.linear2.weight)
        return block

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.linear2(ACTIVATIONS[self.activation](self.linear1(h)))
        return out

    def extra_repr(self) -> str:
        return f"width={self.width}, activation={self.activation!r}"
