"""What one pass tells of a model's structure: which layer makes what which layer reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth.traced_graph import traced


class Residual(nn.Module):
    """Two convolutions with a batch norm and a functional ReLU, beside the identity."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.second = nn.Conv2d(4, channels, 3, padding=1)  # not registered as they run
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        h = F.relu(self.norm(self.first(x)), inplace=True)
        return {"out": [x + scale * self.second(h)], "nothing": None}


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Forward(nn.Module):
    """Layers a [4, 6], b [6, 4] and c [4, 6] under a forward of the test's own."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def test_a_hand_written_forward() -> None:
    graph = traced(Residual(), (torch.randn(2, 3, 5, 5),))
    assert graph.layers == ("first", "second")
    hidden = graph.made_by("first")
    assert hidden is not None
    assert hidden is graph.read_by("second")
    assert hidden.hidden
    assert (hidden.makers, hidden.readers) == (("first",), ("second",))
    assert [(s.kind, s.name, s.module) for s in hidden.steps] == [
        ("norm", "batch_norm", "norm"),
        ("activation", "relu", None),
    ]
    assert hidden.parameters == ("norm.weight", "norm.bias")
    assert graph.why_fixed("first") is None
    assert graph.read_by("first") is None
    assert "with the model's input" in (graph.why_fixed("second") or "")


def test_a_gate_and_its_partner() -> None:
    graph = traced(Gated(), torch.randn(2, 4))
    hidden = graph.made_by("up")
    assert hidden is not None
    assert hidden is graph.made_by("gate")
    assert hidden.gated
    assert hidden.hidden
    assert hidden.makers == ("gate", "up")
    assert graph.consumers("up") == ("down",)
    assert graph.producers("down") == ("gate", "up")
    activation = graph.activation_behind("gate")
    assert activation is not None
    assert activation.name == "silu"
    assert graph.activation_behind("up") is None
    norm = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2))
    found = traced(norm, torch.randn(2, 4)).norm_behind("0")
    assert found is not None
    assert (found.name, found.module) == ("layer_norm", "1")


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.b(m.a(x).view(-1, 2, 3).flatten(1)), "reshaped to [2, 2, 3]"),
        (lambda m, x: m.b(torch.cat(m.a(x).chunk(2, -1), -1)), "cut into pieces (chunk)"),
        (lambda m, x: m.b(m.a(x)[:, [1, 0, 2, 3, 4, 5]]), "cut into pieces (getitem)"),
        (lambda m, x: m.b(m.a(x)) + m.b(m.a(x)), "runs 2 times"),
        (lambda m, x: (m.b(m.a(x)), m.a.weight.sum()), "its weight is also used in"),
        (lambda m, x: m.b(m.a(x) + m.c(x)), "added to what 'c' makes"),
        (lambda m, x: m.b(m.a(x) * torch.arange(6.0)), "combined by mul with values"),
        (lambda m, x: m.b(m.a(x).softmax(-1)), "summed over its features (softmax)"),
        (lambda m, x: m.b((h := m.a(x)).T @ h), "goes into matmul"),
        (lambda m, x: m.b(m.c(x) * m.a.forward(x)[:, :1]), "it did not run"),
        (lambda m, x: m.b(m.a(x).norm(2, -1, keepdim=True).expand(-1, 6)), "goes into norm"),
        (lambda m, x: (h := m.a(x), m.b(h)), "an output of the model"),
        (lambda m, x: m.b(torch.jit.script(F.silu)(m.a(x))), "cannot be followed"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_has_a_reason(
    forward: Callable[[Any, Tensor], Any], reason: str
) -> None:
    assert reason in (traced(Forward(forward), torch.randn(2, 4)).why_fixed("a") or "")


def test_one_feature_that_is_spread_over_others() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Linear(4, 6), nn.Linear(4, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(input=self.a(x) * self.gate(x).sigmoid())
            return out

    graph = traced(Gate(), torch.randn(2, 4))
    assert graph.why_fixed("a") is None
    assert graph.consumers("a") == ("b",)
    assert graph.why_fixed("gate") == "what it makes is spread over other features by mul"


def test_what_can_be_followed() -> None:
    def views(m: Any, x: Tensor) -> Any:
        h = m.a(x.unsqueeze(1).expand(-1, 3, -1))
        h = h.transpose(1, 2).mul_(2.0).permute(2, 0, 1).reshape(3, -1, 6)[:, :, None]
        return m.b(F.dropout(h.squeeze(2).mean(0) + 1, 0.5))

    graph = traced(Forward(views), torch.randn(2, 4))
    assert graph.why_fixed("a") is None
    assert graph.why_fixed("c") == "it did not run on the sample as a module of its own"


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(Residual(3), nn.Identity())
    model.forward = lambda x: model[0](F.dropout(x) + torch.rand_like(x))  # type: ignore[method-assign]
    model[1].eval()
    model[0].register_buffer("count", torch.zeros(()))
    model[0].norm.register_forward_hook(lambda *_: print(model[0].count.add_(1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    traced(model, torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_samples() -> None:
    graph = traced(Residual(), {"x": torch.randn(2, 3, 5, 5), "scale": 0.5})
    assert graph.why_fixed("first") is None
    with pytest.raises(
        ValueError, match=r"raises RuntimeError on the sample \(.*\); pass an input"
    ):
        traced(Residual(), torch.randn(2, 7, 5, 5))
    with pytest.raises(ValueError, match=r"Parameter 'weight' is lazy"):
        traced(nn.LazyLinear(3), torch.randn(2, 7))
    model = Forward(lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.c(x))
    assert traced(model, torch.ones(2, 4)).trace.data_read_in == {"": "__bool__"}
