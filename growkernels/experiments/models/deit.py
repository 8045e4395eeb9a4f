"""DeiT: the vision transformer of the non-uniform scaling study, at full and at reduced width."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from growkernels.nn import Attention

INITIAL_STD = 0.02  # DeiT's truncated normal for linear weights, class token and positions
EPS = 1e-6  # of the layer norms, as in DeiT


class DropPath(nn.Module):
    """In training, sets x[n] [N, ...] to 0 with probability ``rate``, else to x[n] / (1 - rate).

    The whole residual branch of a sample is dropped (Huang et al. 2016, stochastic depth). Random
    numbers come from the global generator of x's device, as nn.Dropout's do.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        kept = x.new_empty(x.shape[:1] + (1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * kept.div_(1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4g}"


class Mlp(nn.Module):
    """fc2(GELU(fc1(x))) for x [..., embed]; fc1 has ``width`` outputs."""

    def __init__(self, embed: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed, width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width, embed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm attention and MLP, both residual, for tokens [N, T, embed]."""

    def __init__(
        self, embed: int, heads: int, attention_width: int, mlp_width: int, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed, eps=EPS)
        self.attn = Attention(embed, heads, attention_width)
        self.norm2 = nn.LayerNorm(embed, eps=EPS)
        self.mlp = Mlp(embed, mlp_width)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        out: Tensor = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return out


class PatchEmbed(nn.Module):
    """Images [N, channels, S, S] to one token per patch, [N, (S / patch)**2, embed]."""

    def __init__(self, channels: int, embed: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, embed, patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


class DeiT(nn.Module):
    """Images [N, channels, image_size, image_size] to logits [N, classes]; built by ``deit``."""

    def __init__(
        self,
        *,
        embed: int,
        depth: int,
        heads: int,
        attention_width: int,
        mlp_width: int,
        patch: int,
        image_size: int,
        channels: int,
        classes: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_embed = PatchEmbed(channels, embed, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed))
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2 + 1, embed))
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(embed, heads, attention_width, mlp_width, rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed, eps=EPS)
        self.head = nn.Linear(embed, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        tokens = self.blocks(tokens + self.pos_embed)
        logits: Tensor = self.head(self.norm(tokens[:, 0]))
        return logits


def deit(
    *,
    embed: int = 384,
    depth: int = 12,
    heads: int = 6,
    attention_width: int | None = None,
    mlp_width: int | None = None,
    patch: int = 16,
    image_size: int = 224,
    channels: int = 3,
    classes: int = 1000,
    drop_path: float = 0.1,
    generator: torch.Generator | None = None,
) -> DeiT:
    """A DeiT without distillation token (Touvron et al., arXiv 2012.12877); the defaults: DeiT-S.

    With 100 classes DeiT-S has 21.7 M parameters; ``attention_width=192, mlp_width=768``, the
    reduced DeiT-S that Beyond Uniform Scaling (arXiv 2402.12418) starts from, has 11.07 M.
    Parameters are named as in timm's VisionTransformer, except that ``blocks.N.attn`` has q, k and
    v as three layers, which can be of any width and grow one by one; ``split_qkv`` translates.

    Args:
        attention_width: features of q, k and v, a multiple of heads; None: embed. The softmax
            scale stays (embed / heads) ** -0.5.
        mlp_width: outputs of fc1; None: 4 * embed.
        drop_path: rate of the last block, growing linearly from 0 in the first.
        generator: a CPU generator for the initial values (truncated normal of standard deviation
            0.02, zero biases, PyTorch's uniform for the patches); None: the global one.

    Raises:
        ValueError: sizes that do not divide, or that are not positive; a rate outside [0, 1).
    """
    attention_width = embed if attention_width is None else attention_width
    mlp_width = 4 * embed if mlp_width is None else mlp_width
    if min(depth, mlp_width, channels, classes) < 1:
        raise ValueError(
            f"depth {depth}, mlp_width {mlp_width}, channels {channels} and classes {classes} "
            "must all be at least 1."
        )
    if patch < 1 or image_size < patch or image_size % patch:
        raise ValueError(
            f"Images of {image_size} pixels do not divide into patches of {patch}; give a "
            "multiple of the patch size."
        )
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path is {drop_path}; it is a probability in [0, 1).")
    model = DeiT(
        embed=embed,
        depth=depth,
        heads=heads,
        attention_width=attention_width,
        mlp_width=mlp_width,
        patch=patch,
        image_size=image_size,
        channels=channels,
        classes=classes,
        drop_path=drop_path,
    )
    _initialise(model, generator)
    return model


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state of timm's ViT or DeiT, fused ``attn.qkv`` and all, as one that ``DeiT`` loads.

    ``attn.qkv.weight`` [3 * width, embed] and ``.bias`` [3 * width] become those of attn.q, attn.k
    and attn.v; everything else passes through.

    Raises:
        ValueError: a fused tensor whose first size is not a multiple of 3.
    """
    split: dict[str, Tensor] = {}
    for name, value in state.items():
        before, fused, after = name.partition("attn.qkv.")
        if not fused:
            split[name] = value
            continue
        if value.shape[0] % 3:
            raise ValueError(
                f"{name!r} has {value.shape[0]} rows; a fused query, key and value has a multiple "
                "of 3."
            )
        for letter, part in zip("qkv", value.chunk(3), strict=True):
            split[f"{before}attn.{letter}.{after}"] = part.clone()
    return split


@torch.no_grad()
def _initialise(model: DeiT, generator: torch.Generator | None) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=INITIAL_STD, generator=generator)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            # The bound of nn.Conv2d.reset_parameters, which DeiT keeps for its patches.
            bound = module.weight[0].numel() ** -0.5
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound, generator=generator)
    for parameter in (model.cls_token, model.pos_embed):
        nn.init.trunc_normal_(parameter, std=INITIAL_STD, generator=generator)
