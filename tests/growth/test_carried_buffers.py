"""What a grown model holds besides parameters arrives wherever the model goes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scaling_networks import small_cnn, small_deit
from torch import Tensor, nn

from growkernels.growth import NeuronScaling, insertions, rebuild
from growkernels.nn import GrownLinear
from growkernels.nn.grown_layers import FORMS, Branch


def grown(build: Callable[[], nn.Module], form: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    model = build()
    x = sample(model)
    is_cnn = build is small_cnn
    scaling = NeuronScaling(
        model,
        form=form,
        kinds=("conv2d",) if is_cnn else ("linear",),
        widen=() if is_cnn else ("fc1", "v"),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(2):
        with scaling.recording():
            model(x).square().sum().backward()
        scaling.grow(scaling.select(scaling.scores(), 600, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    scaling.close()
    return model.eval(), insertions(model)


def sample(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 3, 8, 8, generator=generator, dtype=next(model.parameters()).dtype)


@pytest.fixture(autouse=True)
def _garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was not written holds what is no index."""
    empty_like = torch.empty_like

    def filled(tensor: Tensor, **options: Any) -> Tensor:
        made = empty_like(tensor, **options)
        return made if made.is_meta else made.fill_(-7)

    monkeypatch.setattr(torch, "empty_like", filled)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("build", [small_cnn, small_deit])
@pytest.mark.parametrize("assign", [False, True])
def test_rebuilt_on_the_meta_device(
    build: Callable[[], nn.Module], form: str, assign: bool
) -> None:
    model, records = grown(build, form)
    with torch.device("meta"):
        other = build().to("meta").eval()
        rebuild(other, records)
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    x = sample(model)
    assert torch.equal(other(x), model(x))
    assert torch.equal(copy.deepcopy(other)(x), model(x))


def test_moved_cast_pickled_and_copied() -> None:
    model, records = grown(small_cnn, "pair")
    x = sample(model)
    expected = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), expected)
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other.to("meta").to_empty(device="cpu").requires_grad_(False)(x[:0]),
                           expected[:0])  # fmt: skip
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), expected)
    narrow = copy.deepcopy(model).float()
    torch.testing.assert_close(narrow(x.float()), expected.float(), rtol=1e-4, atol=1e-5)
    assert not any("index" in key for key in model.state_dict()), "state_dicts are as they were"
    assert records == insertions(copy.deepcopy(model))


def test_compiled_and_exported_after_an_assignment() -> None:
    model, records = grown(small_cnn, "single")
    x = sample(model)
    with torch.device("meta"):
        other = small_cnn().to("meta").eval()
        rebuild(other, records)
    other.load_state_dict(model.state_dict(), assign=True)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    exported = torch.export.export(copy.deepcopy(model), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_no_other_layer_holds_a_buffer_that_does_not_travel() -> None:
    """Non-persistent buffers and bare tensors of modules; the index of a branch is made anew."""
    for build in (small_cnn, small_deit):
        model, _ = grown(build, "gated")
        for module in model.modules():
            hidden = module._non_persistent_buffers_set
            assert hidden == ({"index"} if isinstance(module, Branch) else set())
            bare = [name for name, value in vars(module).items() if isinstance(value, Tensor)]
            assert bare == []
    assert any(isinstance(module, GrownLinear) for module in model.modules())
