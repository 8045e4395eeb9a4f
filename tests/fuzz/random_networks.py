"""Small networks of every sort that grows, described by words and numbers."""

from __future__ import annotations

import copy
import random
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growkernels as gk

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
WIDTHS = (1, 1, 2, 3, 4, 5, 7, 8)
ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "leaky": nn.LeakyReLU,
}
VALUES = ("normal",) * 20 + ("zeros", "tiny", "huge", "subnormal", "nan", "inf")
OPTIMIZERS = (
    *("none", "SGD", "momentum", "Adam", "AdamW", "RMSprop", "NAdam", "two") * 2,
    "Adagrad", "Adafactor", "LBFGS",
)  # fmt: skip

Words = dict[str, Any]


class Mlp(nn.Module):
    """x + fc2(act(fc1(norm(x)))), the MLP of a transformer's block."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[activation]()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm(x))))
        return out


class Gated(nn.Module):
    """x + down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


class Attending(nn.Module):
    """x + attention(norm(x)) over the tokens that a row of features is cut into."""

    def __init__(self, width: int, heads: int, packed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.packed = packed
        if packed:
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            self.attn = gk.nn.Attention(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x)[:, None]
        y = self.attn(tokens, tokens, tokens, need_weights=False)[0] if self.packed else None
        y = self.attn(tokens) if y is None else y
        out: Tensor = x + y[:, 0]
        return out


class BasicBlock(nn.Module):
    """A ResNet's block of two convolutions."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class ByHand(nn.Module):
    """A stem, blocks in a list that a forward calls one by one, and a head."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def random_network(rng: random.Random) -> Words:
    """Words that `build` makes a network of."""
    images = rng.random() < 0.5
    steps: list[list[Any]] = []
    for _ in range(rng.choice((1, 2, 3, 4, 5))):
        width, activation = rng.choice(WIDTHS), rng.choice(list(ACTIVATIONS))
        kinds = ("conv", "conv", "block", "act", "norm", "basis", "group_norm", "pool")
        if not images:
            kinds = ("linear", "linear", "act", "residual", "mlp", "gated", "attention", "norm",
                     "layer_norm", "dropout")  # fmt: skip
        steps.append([rng.choice(kinds), width, activation, rng.random() < 0.7])
        steps[-1].append([rng.choice((1, 3, 3, 5)), rng.choice((1, 1, 2)), rng.choice((1, 1, 2))])
        steps[-1].append(rng.choice((1, 2, 3)))
        if steps[-1][0] in ("linear", "conv") and rng.random() < 0.7:
            steps.append(
                ["act", 1, "relu" if rng.random() < 0.7 else activation, True, [1, 1, 1], 1]
            )
    return {
        "images": images,
        "width": rng.choice(WIDTHS),
        "steps": steps,
        "outputs": rng.choice((1, 2, 3)),
        "by_hand": rng.random() < 0.3,
        "nested": rng.random() < 0.3,
        "shared": rng.random() < 0.05,
        "frozen": rng.random() < 0.05,
        "dtype": rng.choice((*("float32", "float64") * 3, "bfloat16", "float16")),
        "values": rng.choice(VALUES),
        "batch": rng.choice((*(1, 2, 3, 5) * 3, 0)),
        "inputs": rng.choice(VALUES),
        "optimizer": rng.choice(OPTIMIZERS),
        "seed": rng.randrange(1 << 31),
    }


def build(words: Words) -> nn.Module:
    """The network, with the same values each time."""
    with torch.random.fork_rng():
        torch.manual_seed(words["seed"])
        model = _valued(_built(words), words)
    return model.train(words["batch"] > 1)  # batch norms take no single sample


def _built(words: Words) -> nn.Module:
    images, width = words["images"], words["width"]
    made: list[nn.Module] = []
    for step in words["steps"]:
        module, width = _made(images, width, *step)
        made.append(module)
    if words["shared"] and len(made) > 1:
        made.append(made[-1]) if _keeps_width(made[-1]) else None
    if words["by_hand"] and made:
        first, kept, rest = made[0], [], []
        for module in made[1:]:
            (kept if _keeps_width(module) and not rest else rest).append(module)
        head = nn.Sequential(*rest, *_head(images, width, words["outputs"]))
        return ByHand(first, kept, head)
    if words["nested"]:
        made = [nn.Sequential(*made)]
    return nn.Sequential(*made, *_head(images, width, words["outputs"]))


def _keeps_width(module: nn.Module) -> bool:
    kinds = (Mlp, Gated, Attending, BasicBlock, gk.nn.ResidualBlock, *ACTIVATIONS.values())
    return isinstance(module, kinds)


def _head(images: bool, width: int, outputs: int) -> list[nn.Module]:
    last = nn.Linear(width, outputs)
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), last] if images else [last]


def _made(
    images: bool,
    width: int,
    kind: str,
    out: int,
    activation: str,
    bias: bool,
    places: list[int],
    number: int,
) -> tuple[nn.Module, int]:
    kernel, stride, dilation = places
    groups = number if width % number == 0 else 1
    if kind == "act":
        return ACTIVATIONS[activation](), width
    if kind == "norm":
        return (nn.BatchNorm2d if images else nn.BatchNorm1d)(width), width
    if kind == "conv":
        grouped = groups if out % groups == 0 and number == 3 else 1
        mode = "zeros" if number < 3 else "replicate"
        padding = dilation * (kernel - 1) // 2
        conv = nn.Conv2d(width, out, kernel, stride, padding, dilation, grouped, bias, mode)
        return conv, out
    if kind == "basis":
        filters = max(1, min(out, number))
        return gk.nn.BasisConv2d(width, out, kernel, filters, padding=kernel // 2, bias=bias), out
    if kind == "group_norm":
        return nn.GroupNorm(groups, width), width
    if kind == "pool":
        return nn.MaxPool2d(2, ceil_mode=True), width
    if kind == "block":
        return BasicBlock(width, out), width
    if kind == "linear":
        return nn.Linear(width, out, bias), out
    if kind == "residual":
        known = activation if activation in ("tanh", "relu", "gelu", "silu", "sigmoid") else "tanh"
        return gk.nn.ResidualBlock(width, known), width
    if kind == "mlp":
        return Mlp(width, out, activation), width
    if kind == "gated":
        return Gated(width, out), width
    if kind == "attention":
        return Attending(width, groups, packed=bias), width
    if kind == "dropout":
        return nn.Dropout(0.25), width
    return nn.LayerNorm(width, bias=bias), width


def _valued(model: nn.Module, words: Words) -> nn.Module:
    model = model.to(DTYPES[words["dtype"]])
    parameters = list(model.parameters())
    with torch.no_grad():
        for parameter in parameters:
            if words["values"] in ("nan", "inf"):
                break
            parameter.copy_(filled(parameter, words["values"]))
        if words["values"] in ("nan", "inf"):
            chosen = parameters[words["seed"] % len(parameters)]
            chosen.copy_(filled(chosen, words["values"]))
    if words["frozen"]:
        parameters[words["seed"] % len(parameters)].requires_grad_(False)
    return model


def filled(tensor: Tensor, values: str) -> Tensor:
    """The tensor with one NaN or infinity in it, or at another magnitude."""
    tensor = tensor.detach().clone()
    if values in ("nan", "inf") and tensor.numel():
        tensor.view(-1)[tensor.numel() // 2] = float(values)
    limits = torch.finfo(tensor.dtype)
    scales = {"zeros": 0.0, "tiny": 1e-30, "huge": 1e30, "subnormal": limits.tiny / 8}
    if values in scales:
        scale = min(scales[values], limits.max / 64)
        if scale > 0:
            scale = max(scale, limits.tiny / 8)
        tensor = (tensor.double() * scale).to(tensor.dtype)
    return tensor


def batch_of(words: Words, number: int = 0, values: str | None = None) -> Tensor:
    """An input of the network."""
    generator = torch.Generator().manual_seed(words["seed"] + 1 + number)
    shape = (words["batch"], words["width"], *((5, 4) if words["images"] else ()))
    x = torch.randn(shape, generator=generator).to(DTYPES[words["dtype"]])
    return filled(x, words["inputs"] if values is None else values)


def optimizer_of(model: nn.Module, words: Words) -> Any:
    """The optimizer that the words name, with the state that a step or two leave."""
    kind = words["optimizer"]
    parameters = list(model.parameters())
    if kind == "none":
        return None
    if kind == "two":
        half = (len(parameters) + 1) // 2
        optimizers: Any = [
            torch.optim.SGD(parameters[:half], lr=0.01, momentum=0.9),
            torch.optim.AdamW(parameters[half:] or [nn.Parameter(torch.zeros(1))], lr=0.01),
        ]
    elif kind == "momentum":
        optimizers = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1)
    else:
        optimizers = getattr(torch.optim, kind)(parameters, lr=0.01)
    steps = optimizers if isinstance(optimizers, list) else [optimizers]
    if kind != "LBFGS" and words["values"] == "normal" and words["batch"] > 1 and words["seed"] % 2:
        loss_of(model, batch_of(words, 99, "normal")).backward()
        for each in steps:
            with suppress(ZeroDivisionError):  # torch's Adafactor, of a gradient of zeros
                each.step()
            each.zero_grad()
    return optimizers


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return (y.float() - 0.5).square().mean() + y.float().sum() / 7


def function_of(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """The output in float64 and eval mode, and the largest value on the way to it."""
    wide = copy.deepcopy(model).double().eval()
    largest = [1e-300]

    def note(module: nn.Module, args: Any, output: Any) -> None:
        found = output[0] if isinstance(output, tuple) else output
        if isinstance(found, Tensor) and found.numel():
            largest.append(float(found.detach().abs().nan_to_num(torch.inf, torch.inf).max()))

    for module in wide.modules():
        module.register_forward_hook(note)
    with torch.no_grad():
        y = wide(x.double())
    return y, max(largest)


def check_same_function(
    before: tuple[Tensor, float], after: tuple[Tensor, float], dtype: torch.dtype
) -> None:
    """Asserts that outputs differ by no more than rounding, where they are numbers."""
    y, largest = before
    z, also = after
    assert y.shape == z.shape, (y.shape, z.shape)
    largest = max(largest, also)
    if not y.numel() or not largest < 1e100:
        return
    error = float((y - z).abs().max())
    allowed = 64 * torch.finfo(dtype).eps * largest
    assert error <= allowed, f"the function changed by {error:.2e} of {largest:.2e}"
