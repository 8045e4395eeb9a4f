"""Multi-head self-attention whose query, key and value widths are free of the embedding's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """softmax(scale * q kᵀ) v per head, then a projection; x [N, T, embed] to [N, T, embed].

    ``q``, ``k`` and ``v`` are linear layers from embed to ``width`` features, ``proj`` is one from
    ``width`` to embed, all with bias. Head h owns the h-th of ``heads`` equal runs of features, in
    q and k and, of a length of its own, in v and in the input of proj. ``scale`` does not follow
    ``width``: it is (embed / heads) ** -0.5, that of the attention at full width, so that features
    can be added to q and k without changing the softmax (Beyond Uniform Scaling, arXiv 2402.12418,
    halves the width and keeps the scale).

    Raises:
        ValueError: embed or width is not a positive multiple of heads.
    """

    def __init__(
        self,
        embed: int,
        heads: int,
        width: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = embed if width is None else width
        for name, value in (("embed", embed), ("width", width)):
            if heads < 1 or value < 1 or value % heads:
                raise ValueError(
                    f"{name} is {value} with {heads} heads; it must be a positive multiple of the "
                    "number of heads."
                )
        self.heads = heads
        self.scale = (embed / heads) ** -0.5
        self.q = nn.Linear(embed, width, device=device, dtype=dtype)
        self.k = nn.Linear(embed, width, device=device, dtype=dtype)
        self.v = nn.Linear(embed, width, device=device, dtype=dtype)
        self.proj = nn.Linear(width, embed, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x)

    def attend(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        """``forward(x)``, with ``dropout`` as the probability that a weight v is mixed by is 0."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        out: Tensor = self.proj(mixed.transpose(-3, -2).flatten(-2))
        return out

    def extra_repr(self) -> str:
        return f"heads={self.heads}, scale={self.scale:.4g}"
