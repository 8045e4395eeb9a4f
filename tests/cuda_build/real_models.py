"""The published implementations, at the sizes that the tests want, and training on noise."""

from __future__ import annotations

import io
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from growkernels.growth import insertions

CLASSES = 10


def deit_small(**changes: Any) -> nn.Module:
    """timm's DeiT-S."""
    torch.manual_seed(0)
    options = {"pretrained": False, "num_classes": CLASSES, **changes}
    model: nn.Module = timm.create_model("deit_small_patch16_224", **options)
    return model


def small_timm_vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    model: nn.Module = VisionTransformer(num_classes=CLASSES, **sizes)
    return model


def small_torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=CLASSES, attention_dropout=0.0,
    )  # fmt: skip
    nn.init.normal_(model.get_parameter("heads.head.weight"))  # zeros, so nothing would learn
    return model


def resnet18() -> nn.Module:
    """torchvision's ResNet-18."""
    torch.manual_seed(0)
    model: nn.Module = torchvision.models.resnet18(num_classes=CLASSES)
    return model


def images(count: int = 8, pixels: int = 32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, pixels, pixels, generator=generator)
    return x, torch.randint(0, CLASSES, (count,), generator=generator)


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=1e-3)


def train(model: nn.Module, optimizer: Optimizer, seeds: range) -> None:
    model.train()
    for seed in seeds:
        x, y = images(seed=seed)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def outputs(model: nn.Module, pixels: int = 32) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(images(4, pixels, seed=9)[0])
    return result


def change(before: Tensor, after: Tensor) -> float:
    """The largest change of an output, relative to the largest output."""
    return float((after - before).abs().max() / before.abs().max())


def checkpoint(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Saved to a file and read again, as a killed run would."""
    file = io.BytesIO()
    saved = {
        "insertions": insertions(model),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded
