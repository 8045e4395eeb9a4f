"""Random layers of growkernels.nn against float64 formulas of their own."""

from __future__ import annotations

import random
from typing import Any

import torch
from random_networks import ACTIVATIONS, DTYPES, filled
from refusals import one_call
from solver_calls import laid_out
from torch import Tensor, nn
from torch.nn import functional as F

import growkernels as gk

WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 16)
VALUES = ("normal",) * 6 + ("zeros", "tiny", "huge", "subnormal", "nan", "inf")


def random_layer(rng: random.Random) -> dict[str, Any]:
    def two(*choices: int) -> Any:
        values = [rng.choice(choices), rng.choice(choices)]
        return values[0] if rng.random() < 0.5 else values

    sizes = [rng.choice(WIDTHS) for _ in range(3)]
    if rng.random() < 0.7:  # filters, or heads
        sizes[2] = min(sizes[2], sizes[1])
        sizes[:2] = [size * sizes[2] for size in sizes[:2]] if rng.random() < 0.3 else sizes[:2]
    if rng.random() < 0.1:
        sizes[rng.randrange(3)] = rng.choice((-1, 0))
    return {
        "sizes": sizes,
        "kernel": two(1, 1, 2, 3, 3, 5) if rng.random() < 0.95 else 0,
        "stride": two(1, 1, 1, 2, 3),
        "padding": rng.choice((*[two(0, 1, 1, 2, 9) for _ in range(9)], "same", "valid", "full")),
        "dilation": two(1, 1, 1, 2, 4),
        "bias": rng.random() < 0.5,
        "include_basis": rng.random() < 0.5,
        "init": rng.choice((*("svd", "select") * 5, "pca")),
        "kind": rng.choice((*("linear_relu", "conv2d_relu", "residual") * 3, "linear")),
        "activation": rng.choice((*ACTIVATIONS, "step")),
        "dtype": rng.choice(list(DTYPES)),
        "values": rng.choice(VALUES),
        "inputs": rng.choice(VALUES),
        "layout": rng.choice(("plain", "transposed", "stepped", "expanded", "channels_last")),
        "batch": rng.choice((0, 1, 1, 2, 3)),
        "sides": [rng.choice((0, 1, 3, 5, 9)) for _ in range(2)],
        "rank": rng.choice((0, 1, 2, 3)),
        "seed": rng.randrange(1 << 31),
    }


def _input(words: dict[str, Any], *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(words["seed"])
    x = torch.randn(shape, generator=generator).to(DTYPES[words["dtype"]])
    x = filled(x, words["inputs"])
    if words["layout"] == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    return laid_out(x, words["layout"])


def _fill(module: nn.Module, words: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(words["seed"] + 1)
    with torch.no_grad():
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator) / 3
            parameter.copy_(filled(values.to(parameter.dtype), words["values"]))


def check_close(ours: Tensor, oracle: Tensor, scale: Tensor, algorithm: float = 1.0) -> None:
    """Asserts |ours - oracle| within rounding of the sums of absolute values `scale`."""
    assert ours.shape == oracle.shape, (ours.shape, oracle.shape)
    limits = torch.finfo(ours.dtype)
    largest = float(scale.nan_to_num(torch.inf).max()) if scale.numel() else 0.0
    if not largest < min(limits.max / 64, 1e30):
        return
    wide = max(limits.eps, torch.finfo(torch.float32).eps if ours.dtype.itemsize < 8 else 0)
    allowed = algorithm * 64 * wide * largest + 4096 * limits.tiny
    error = float((ours.detach().double() - oracle).abs().max()) if ours.numel() else 0.0
    assert error <= allowed, f"{ours.dtype}: off by {error:.2e}, {allowed:.2e} allowed"


def _paired(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def basis_layer(words: dict[str, Any]) -> None:
    inputs, outputs, filters = words["sizes"]
    with one_call():
        layer = gk.nn.BasisConv2d(
            inputs,
            outputs,
            words["kernel"],
            filters,
            words["stride"],
            words["padding"],
            words["dilation"],
            words["bias"],
            words["include_basis"],
            dtype=DTYPES[words["dtype"]],
        )
    _fill(layer, words)
    repr(layer)
    x = _input(words, *((words["batch"],) if words["batch"] != 3 else ()), inputs, *words["sides"])
    with one_call(layer):
        y = layer(x)
    kernel = _kernel(layer)
    places = (layer.stride, layer.padding, layer.dilation)
    bias = None if layer.bias is None else layer.bias.detach().double()
    oracle = F.conv2d(x.double(), kernel, bias, *places)
    scale = F.conv2d(x.double().abs(), _kernel(layer, absolute=True), None, *places)
    scale = scale + (0 if bias is None else bias.abs()[:, None, None])
    maps = F.conv2d(x.double().abs(), layer.basis.detach().double().abs(), None, *places)
    if float(maps.nan_to_num(torch.inf).amax()) < 1e30 if maps.numel() else True:
        check_close(y, oracle, scale, 16.0)
    with one_call(layer):
        conv = layer.to_conv()
    with torch.no_grad():
        check_close(conv.weight, kernel, _kernel(layer, absolute=True))


def _kernel(layer: gk.nn.BasisConv2d, absolute: bool = False) -> Tensor:
    basis, coeff = layer.basis.detach().double(), layer.coeff.detach().double()
    if absolute:
        basis, coeff = basis.abs(), coeff.abs()
    mixed = torch.einsum("or,rchw->ochw", coeff, basis)
    return torch.cat([basis, mixed]) if layer.include_basis else mixed


def basis_from_conv(words: dict[str, Any]) -> None:
    """A kernel of rank R comes back; else the error is that of the best approximation, or near."""
    inputs, outputs, filters = (max(size, 1) for size in words["sizes"][:2]), 0, words["sizes"][2]
    inputs, outputs = inputs
    padding = words["padding"] if words["padding"] != "full" else 1
    stride = 1 if padding == "same" else words["stride"]
    try:
        conv = nn.Conv2d(
            inputs, outputs, words["kernel"], stride, padding, words["dilation"],
            bias=words["bias"], dtype=DTYPES[words["dtype"]],
        )  # fmt: skip
    except Exception:  # what torch refuses is not asked of us
        return
    _fill(conv, words)
    with torch.no_grad():
        if words["rank"]:
            factors = conv.weight.flatten(1).double()
            rank = min(words["rank"], *factors.shape)
            low = factors[:, :rank] @ factors[:rank] if rank else factors
            conv.weight.copy_(low.reshape(conv.weight.shape).to(conv.weight.dtype))
    with one_call(conv):
        layer = gk.nn.BasisConv2d.from_conv(
            conv, filters, words["init"], words["include_basis"] if words["batch"] else None
        )
    matrix = conv.weight.detach().double().flatten(1)
    ours = _kernel(layer).flatten(1)
    norm = float(matrix.norm())
    if not 1e-20 < norm < 1e20:
        return
    values = torch.linalg.svdvals(matrix)
    best = float(values[filters:].square().sum())
    error = float((ours - matrix).square().sum())
    eps = torch.finfo(conv.weight.dtype).eps
    rounding = (256 * eps * norm) ** 2
    if words["init"] == "svd" and not layer.include_basis:
        assert error <= 1.05 * best + rounding, (error, best, norm)
    assert error <= norm**2 * 1.001 + rounding, (error, norm)
    if best <= (eps * norm) ** 2 and not layer.include_basis:
        assert error <= rounding, (error, norm)


def identity(words: dict[str, Any]) -> None:
    width = words["sizes"][0]
    dtype = DTYPES[words["dtype"]]
    with one_call():
        layer = gk.nn.identity_layer(
            words["kind"], width, activation=words["activation"], scale=0.8, dtype=dtype
        )
    x = _input(words, words["batch"], width, *(words["sides"] if _is_conv(words) else ()))
    if words["kind"] != "residual":
        x = x.abs()
    if _is_conv(words) and not x.numel():
        return  # torch convolves no empty images
    y = layer(x)
    usual = bool(x.isfinite().all()) and float(x.double().abs().max() if x.numel() else 0) < 1e30
    if usual and dtype in (torch.float32, torch.float64):
        assert bool(((y - x).abs() <= torch.finfo(dtype).tiny * 2).all())


def _is_conv(words: dict[str, Any]) -> bool:
    return bool(words["kind"] == "conv2d_relu")


def trained_layer(words: dict[str, Any]) -> None:
    """The layers that growth inserts, at values far from those that they start with."""
    width, kind = words["sizes"][0], words["kind"]
    dtype, activation = DTYPES[words["dtype"]], words["activation"]
    with one_call():
        layer = gk.nn.identity_layer(kind, width, activation=activation, dtype=dtype)
    _fill(layer, words)
    if _is_conv(words) and not all(words["sides"]):
        return  # torch convolves no empty images
    x = _input(words, words["batch"], width, *(words["sides"] if _is_conv(words) else ()))
    y = layer(x)
    wide = {name: value.detach().double() for name, value in layer.named_parameters()}
    h = x.double()
    if kind == "residual":
        act = ACTIVATIONS[activation]()
        inner = F.linear(h, wide["linear1.weight"], wide["linear1.bias"])
        oracle = h + F.linear(act(inner), wide["linear2.weight"])
        reach = h.abs() @ wide["linear1.weight"].abs().T + wide["linear1.bias"].abs() + 1
        scale = h.abs() + reach @ wide["linear2.weight"].abs().T
    elif _is_conv(words):
        oracle = F.conv2d(h, wide["weight"], wide["bias"], padding=1).relu()
        scale = F.conv2d(h.abs(), wide["weight"].abs(), wide["bias"].abs(), padding=1)
    else:
        oracle = F.linear(h, wide["weight"], wide["bias"]).relu()
        scale = F.linear(h.abs(), wide["weight"].abs(), wide["bias"].abs())
    check_close(y, oracle, scale, 16.0)


def attention(words: dict[str, Any]) -> None:
    """softmax(scale q k') v, head by head."""
    embed, width, heads = words["sizes"]
    dtype = DTYPES[words["dtype"]]
    with one_call():
        layer = gk.nn.Attention(embed, heads, width, dtype=dtype)
    _fill(layer, words)
    x = _input(words, words["batch"], words["sides"][0], embed)
    with one_call(layer):
        y = layer(x)
    if words["values"] != "normal" or words["inputs"] != "normal":
        return
    wide = {name: value.detach().double() for name, value in layer.named_parameters()}
    q, k, v = (F.linear(x.double(), wide[f"{n}.weight"], wide[f"{n}.bias"]) for n in "qkv")
    size = width // heads
    mixed = []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        similar = q[..., part] @ k[..., part].transpose(1, 2) * (embed / heads) ** -0.5
        mixed.append(similar.softmax(-1) @ v[..., part])
    oracle = F.linear(torch.cat(mixed, -1), wide["proj.weight"], wide["proj.bias"])
    coarse = 64 if dtype.itemsize == 2 else 4
    check_close(y, oracle, (oracle.abs() + 1) * width * coarse, 16.0)
