"""GradMax and TINY for convolutions, with and without a batch norm, against explicit matrices.

What new channels do to the reader's output is bilinear in their weights a and w where the
activation is the identity: B(a, w) = sum(t * conv(conv(x, a), w)) for targets t. Its matrix is
taken here entry by entry from autograd, so that no patches and no borders are counted by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from scaling_networks import assert_repeats
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import NeuronScaling


class Net(nn.Module):
    """conv, perhaps a batch norm, an activation, conv of stride 2, added to a shortcut."""

    def __init__(self, act: nn.Module, *, norm: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(2, 6, (3, 2), padding=1, bias=bias)
        self.norm: nn.Module = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.act = act
        self.conv2 = nn.Conv2d(6, 3, 3, stride=2, padding=1, dilation=(1, 2), bias=not norm)
        self.shortcut = nn.Conv2d(2, 3, 1, stride=2)
        self.head = nn.Linear(3, 3)
        self.double()

    def hidden(self, x: Tensor) -> Tensor:
        h: Tensor = self.act(self.norm(self.conv1(x)))
        return h

    def output(self, z: Tensor, x: Tensor) -> Tensor:
        shortcut = self.shortcut(x)[:, :, : z.shape[2], : z.shape[3]]
        y: Tensor = self.head((z + shortcut).tanh().mean((2, 3)))
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.conv2(self.hidden(x)), x)


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, 2, 5, 6, generator=generator).double() + 0.3, torch.arange(4) % 3)
        for _ in range(count)
    ]


def loss_of(model: nn.Module, count: int = 3) -> Tensor:
    return torch.stack([F.cross_entropy(model(x), y) for x, y in batches(count)]).mean()


def recorded(model: nn.Module, criterion: str, count: int = 3, **options: Any) -> NeuronScaling:
    scaling = NeuronScaling(
        model,
        criterion,
        layers=["conv1"],
        kinds=("conv2d",),
        widen=("conv",),
        depth=False,
        sample=batches()[0][0],
        **options,
    )
    for x, y in batches(count):
        with scaling.recording():
            F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    return scaling


def gradients(model: Net) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, h and dL/dz of every batch."""
    found = []
    for x, y in batches():
        h = model.hidden(x)
        z = model.conv2(h)
        (g,) = torch.autograd.grad(F.cross_entropy(model.output(z, x), y), z)
        found.append((x, h.detach(), g))
    return found


def like(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)  # type: ignore[arg-type]


def bilinear(model: Net, x: Tensor, target: Tensor, centred: bool = False) -> Tensor:
    """[D K, d] of B(a, w), and with ``centred`` of the map conv(x, a) without its mean."""
    rows = []
    d, taps = model.conv1.weight[0].numel(), model.conv2.weight[0, 0].numel()
    for entry in range(3 * taps):
        w = torch.zeros(3 * taps).double()
        w[entry] = 1
        a = torch.zeros(1, *model.conv1.weight.shape[1:]).double().requires_grad_()
        hidden = like(model.conv1, x, a)
        if centred:
            hidden = hidden - hidden.mean()
        form = (target * like(model.conv2, hidden, w.view(3, 1, 3, 3))).sum()
        rows.append(torch.autograd.grad(form, a)[0].reshape(d))
    return torch.stack(rows)


def maps(model: Net, x: Tensor) -> Tensor:
    """[places, d]: conv1's map for every single weight."""
    d = model.conv1.weight[0].numel()
    weights = torch.eye(d).double().view(d, *model.conv1.weight.shape[1:])
    return like(model.conv1, x, weights).movedim(1, -1).flatten(0, -2)


@pytest.mark.parametrize("name", ["tanh", "gelu", "identity"])
def test_gradmax_without_a_norm(name: str) -> None:
    act, slope = {
        "tanh": (nn.Tanh(), 1.0),
        "gelu": (nn.GELU(), 0.5),
        "identity": (nn.Identity(), 1.0),
    }[name]
    model = Net(act)
    scaling = recorded(model, "gradmax")
    scores = scaling.scores()
    each = torch.stack([bilinear(model, x, g) for x, _, g in gradients(model)])
    singular = torch.linalg.svdvals(each.mean(0))[:6]
    c = model.conv2.weight.detach().transpose(0, 1).flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(scores.values["conv1"], -((slope * c * singular) ** 2))
    variance = (each - each.mean(0)).square().sum() / (2 * 3)
    assert scores.snr["conv1"] == pytest.approx(float(each.mean(0).square().sum() / variance))
    scaling.grow(
        scaling.select(scores, 3 * (12 + 1 + 27), 1), init="gradmax", sample=batches()[0][0]
    )
    loss_of(model).backward()
    gradient = model.conv1.weight.grad
    assert gradient is not None
    torch.testing.assert_close(gradient[6:].flatten(1).norm(dim=1), slope * c * singular[:3])


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Sigmoid()], ids=["relu", "sigmoid"])
def test_gradmax_turned_round_where_padding_would_show_a_constant(act: nn.Module) -> None:
    model = Net(act)
    scaling = recorded(model, "gradmax")
    scores = scaling.scores()
    n = torch.stack([bilinear(model, x, g) for x, _, g in gradients(model)]).mean(0)
    c = model.conv1.weight.detach().flatten(1).norm(dim=1).mean()
    y = torch.randn(10**6, generator=torch.Generator().manual_seed(0)).double()
    linear = float((y * act(y)).mean())
    expected = -((linear * c * torch.linalg.svdvals(n)[:6]) ** 2)
    torch.testing.assert_close(scores.values["conv1"], expected, rtol=1e-2, atol=0)
    before = [model(x).detach() for x, _ in batches()]
    scaling.grow(
        scaling.select(scores, 3 * (12 + 1 + 27), 1), init="gradmax", sample=batches()[0][0]
    )
    for (x, _), old in zip(batches(), before, strict=True):
        torch.testing.assert_close(model(x).detach(), old, rtol=1e-12, atol=1e-13)
    loss_of(model).backward()
    assert model.conv2.weight.grad is not None
    assert bool(model.conv2.weight.grad[:, 6:].flatten(2).any(2).any(0).all())


def test_gradmax_behind_a_batch_norm() -> None:
    """Without an activation the score is the squared norm of the gradient that comes."""
    model = Net(nn.Identity(), norm=True, bias=False)
    scaling = recorded(model, "gradmax", count=1)
    scores = scaling.scores()
    x, _, g = gradients(model)[0]
    n = bilinear(model, x, g, centred=True)
    covariance = maps(model, x).T.cov(correction=0)
    values, vectors = torch.linalg.eigh(covariance)
    singular = torch.linalg.svdvals(n @ vectors @ torch.diag(values**-0.5))[:6]
    torch.testing.assert_close(scores.values["conv1"], -(singular**2))
    before = model(x).detach()
    scaling.grow(scaling.select(scores, 3 * (12 + 2 + 27), 1), init="gradmax", sample=x)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-12, atol=1e-13)
    loss_of(model, 1).backward()
    gradient = model.conv2.weight.grad
    assert gradient is not None
    found = gradient[:, 6:].transpose(0, 1).flatten(1).norm(dim=1)
    torch.testing.assert_close(found, singular[:3], rtol=2e-5, atol=0)  # the norm has an eps
    new = model.conv1(x).detach()[:, 6:].transpose(0, 1).flatten(1)
    torch.testing.assert_close(new.var(1, correction=0), torch.ones(3).double())
    norm = model.norm
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    fresh = copy.deepcopy(norm)
    fresh.reset_running_stats()
    fresh.momentum = 1.0
    fresh(model.conv1(x))
    assert fresh.running_mean is not None
    # One further step of the running mean in training has moved these towards what they were.
    torch.testing.assert_close(norm.running_mean[6:], fresh.running_mean[6:])


@pytest.mark.parametrize("norm", [False, True])
def test_tiny(norm: bool) -> None:
    model = Net(nn.Tanh(), norm=norm)
    scores = recorded(model, "tiny").scores()
    data = gradients(model)
    outputs = sum(g[:, 0].numel() for _, _, g in data)
    h = torch.cat([F.unfold(h, 3, (1, 2), 1, 2).transpose(1, 2).flatten(0, 1) for _, h, _ in data])
    if model.conv2.bias is not None:
        h = torch.cat([h, torch.ones(len(h), 1).double()], 1)
    # The loss is a mean over the outputs of a batch: one output's own gradient is larger.
    per_batch = outputs // 3
    wished = torch.cat([-per_batch * g.movedim(1, -1).flatten(0, -2) for _, _, g in data])
    rest = wished - h @ torch.linalg.lstsq(h, wished, driver="gelsd").solution
    n = torch.zeros(27, 12).double()
    for (x, _, g), own in zip(data, rest.split(per_batch), strict=True):
        target = own.view(len(g), *g.shape[2:], 3).movedim(-1, 1)
        n += bilinear(model, x, target, centred=norm) / outputs
    places = [maps(model, x) for x, _, _ in data]
    if norm:
        each = torch.cat([p - p.mean(0) for p in places])
        s, slope, ones = each.T @ each / len(each), None, 0
    else:
        each = torch.cat(places)
        each = torch.cat([each, torch.ones(len(each), 1).double()], 1)
        s, slope, ones = each.T @ each / outputs, 1.0, 1
    if ones:  # a bias's map is 1 in all places
        column = torch.zeros(27).double()
        for (x, _, g), own in zip(data, rest.split(per_batch), strict=True):
            target = own.view(len(g), *g.shape[2:], 3).movedim(-1, 1)
            w = torch.zeros(3, 1, 3, 3).double().requires_grad_()
            hidden = torch.ones_like(model.conv1(x)[:, :1])
            form = (target * like(model.conv2, hidden, w)).sum()
            column += torch.autograd.grad(form, w)[0].flatten() / outputs
        n = torch.cat([n, column[:, None]], 1)
    values, vectors = torch.linalg.eigh(s)
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    u, singular, vh = torch.linalg.svd(root @ n.T, full_matrices=False)
    if slope is None:
        y = torch.linspace(-8, 8, 4001).double()
        density = (-y.square() / 2).exp()
        slope = float((density * y * y.tanh()).sum() / density.sum())
    torch.testing.assert_close(
        scores.values["conv1"], -slope * singular[:6] ** 2 / 9, rtol=1e-6, atol=1e-12
    )
    start = scores.starts["conv1"]
    assert start.outgoing is not None
    incoming = start.weight.flatten(1)
    if ones:
        incoming = torch.cat([incoming, start.bias[:, None]], 1)
    product = start.outgoing.movedim(1, -1).reshape(27, 6) @ incoming
    best = (vh.T[:, :6] * singular[:6]) @ (root @ u[:, :6]).T / 9
    torch.testing.assert_close(product, best, rtol=1e-6, atol=1e-10)


def test_new_channels_of_tiny_lower_the_loss_as_their_linear_effect_says() -> None:
    model = Net(nn.Tanh())
    scaling = recorded(model, "tiny")
    scores = scaling.scores()
    start = scores.starts["conv1"]
    assert start.outgoing is not None
    rise = 0.0
    for x, _, g in gradients(model):
        hidden = like(model.conv1, x, start.weight) + start.bias[:, None, None]
        rise += float((g * like(model.conv2, hidden, start.outgoing)).sum()) / 3
    before, scale = float(loss_of(model).detach()), 1e-5
    chosen = scaling.select(scores, 10**6, 1)
    assert len(chosen.neurons["conv1"]) == 6
    scaling.grow(chosen, init="tiny", scale=scale)
    assert (float(loss_of(model).detach()) - before) / scale == pytest.approx(rise, rel=2e-3)
    assert rise < 0


@pytest.mark.parametrize("criterion", ["gradmax", "tiny"])
def test_the_same_again_from_the_record(criterion: str) -> None:
    model = Net(nn.ReLU(), norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model).backward()
    optimizer.step()
    base = copy.deepcopy(model)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    scaling = recorded(model, criterion)
    chosen = scaling.select(scaling.scores(), 100, 1)
    record = scaling.record(chosen, optimizer, init=criterion, scale=0.3)
    # What recording has moved in the running statistics is no part of the growth.
    saved[0].update({k: v.clone() for k, v in model.state_dict().items() if "running" in k})
    saved[0]["norm.num_batches_tracked"] = model.state_dict()["norm.num_batches_tracked"].clone()
    scaling.grow(chosen, optimizer, init=criterion, scale=0.3)
    assert_repeats(record, saved, base, model)


@pytest.mark.parametrize("criterion", ["gradmax", "tiny"])
def test_sums_survive_in_a_state(criterion: str) -> None:
    model = Net(nn.ReLU(), norm=True).eval()
    whole = recorded(model, criterion)
    resumed = recorded(model, criterion, count=0)
    resumed.load_state_dict(whole.state_dict())
    torch.testing.assert_close(
        resumed.scores().values["conv1"], whole.scores().values["conv1"], rtol=0, atol=0
    )


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def test_refusals() -> None:
    def refused(model: nn.Module, sample: Tensor, role: str, criterion: str, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            NeuronScaling(
                model,
                criterion,
                kinds=("linear", "conv2d"),
                widen=(role,),
                depth=False,
                sample=sample,
            )

    image = torch.randn(2, 2, 5, 5)
    refused(Gated(), torch.randn(3, 4), "gated", "gradmax", "no closed form")
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 3))
    refused(grouped, image, "conv", "gradmax", "normalises each sample by itself")
    behind = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3))
    refused(behind, image, "conv", "gradmax", "what its activation has made")
    circular = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")
    )
    refused(circular, image, "conv", "gradmax", "pads with something else")
    bare = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 3, 3, bias=False))
    refused(bare, image, "conv", "tiny", "no bias to take that back")
