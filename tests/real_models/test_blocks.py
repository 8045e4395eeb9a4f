"""Blocks inserted between the residual blocks of real models: merits, function, training on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from networks import loss_of, outputs_of
from torch import Tensor, nn

from growkernels.growth import LayerInsertion, insertions, rebuild

# A block of each architecture, and what is zero in a new one: written down, not asked for.
BLOCKS: dict[str, tuple[str, list[str]]] = {
    "resnet18": ("layer1.0", ["bn2.weight", "bn2.bias"]),
    "mobilenet": ("features.5", ["block.3.1.weight", "block.3.1.bias"]),
    "convnext": ("features.3.1", ["layer_scale"]),
    "torchvision_vit": (
        "encoder.layers.encoder_layer_0",
        [
            *("self_attention.out_proj.weight", "self_attention.out_proj.bias"),
            *("mlp.3.weight", "mlp.3.bias"),
        ],
    ),
    "timm_deit": (
        "blocks.1",
        ["attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"],
    ),
    "timm_swin": (
        "layers.1.blocks.1",
        ["attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"],
    ),
    "timm_efficientnet": ("blocks.2.1", ["bn3.weight", "bn3.bias"]),
    "timm_convnext": ("stages.1.blocks.0", ["gamma"]),
    "gpt2": (
        "transformer.h.0",
        ["attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"],
    ),
    "llama": ("model.layers.1", ["self_attn.o_proj.weight", "mlp.down_proj.weight"]),
    "hf_vit": (
        "vit.layers.0",
        ["attention.o_proj.weight", "attention.o_proj.bias", "mlp.fc2.weight", "mlp.fc2.bias"],
    ),
    "torch_encoder": (
        "0.layers.0",
        [
            *("self_attn.out_proj.weight", "self_attn.out_proj.bias"),
            *("linear2.weight", "linear2.bias"),
        ],
    ),
}


class Followed(nn.Module):
    """A block with another one behind it, called as the first is."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("first"), name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        h = self.first(x, *args, **kwargs)
        return self.second(h if isinstance(h, Tensor) else h[0], *args, **kwargs)


def explicit_merit(model: nn.Module, sample: Any, path: str, zero: list[str]) -> float:
    """||dL/dW||^2 by autograd on a network in which the new block is written in."""
    extended = copy.deepcopy(model)
    if hasattr(extended, "config"):
        extended.config.use_cache = False  # two blocks of one number would share their keys
    block = extended.get_submodule(path)
    new = copy.deepcopy(block)
    weights = [dict(new.named_parameters())[name] for name in zero]
    for weight in weights:
        weight.data.zero_()
    parent, _, child = path.rpartition(".")
    setattr(extended.get_submodule(parent), child, Followed(block, new))
    grads = torch.autograd.grad(loss_of(extended, sample), weights)
    return sum(float(grad.square().sum()) for grad in grads)


@pytest.mark.parametrize("name", BLOCKS)
def test_merits_are_those_of_the_extended_network(name: str) -> None:
    path, zero = BLOCKS[name]
    model, sample = networks.build(name, torch.float64)
    model.train()
    inserter = LayerInsertion(model, sample=sample, kinds=["block"])
    expected = explicit_merit(model, sample, path, zero)
    with inserter.recording():
        loss_of(model, sample).backward()
    merits = inserter.merits()
    assert float(merits.values[merits.names.index(path)]) == pytest.approx(expected, rel=1e-9)
    assert expected > 0


@pytest.mark.parametrize("name", BLOCKS)
def test_an_inserted_block_keeps_the_function_and_trains(name: str) -> None:
    path, zero = BLOCKS[name]
    model, sample = networks.build(name)
    base = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = outputs_of(model, sample)
    inserter = LayerInsertion(model, {path: "block"}, sample=sample)
    train(model, sample, optimizer, inserter)
    states = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    before = outputs_of(model, sample)
    new = inserter.insert(path, optimizer)
    assert torch.allclose(outputs_of(model, sample), before, rtol=0, atol=1e-6 * before.abs().max())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert all(torch.equal(optimizer.state[p]["exp_avg"], states[id(p)])
               for p in model.parameters() if id(p) in states)  # fmt: skip
    weights = dict(new.named_parameters())
    assert not any(weights[entry].any() for entry in zero)
    for _ in range(5):
        train(model, sample, optimizer)
    assert all(weights[entry].any() for entry in zero)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert outputs_of(model, sample).isfinite().all()
    rebuild(base, insertions(model))
    base.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(base, sample), outputs_of(model, sample))


def train(
    model: nn.Module,
    sample: Any,
    optimizer: torch.optim.Optimizer,
    inserter: LayerInsertion | None = None,
) -> None:
    model.train()
    optimizer.zero_grad()
    if inserter is None:
        loss_of(model, sample).backward()
    else:
        with inserter.recording():
            loss_of(model, sample).backward()
    optimizer.step()


@pytest.mark.parametrize("name", BLOCKS)
def test_fresh_blocks_are_drawn_by_every_library(name: str) -> None:
    path, zero = BLOCKS[name]
    model, sample = networks.build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * (parameter if parameter.dim() > 1 else 1)
    inserter = LayerInsertion(model, {path: "block"}, sample=sample, init="fresh")
    assert not any("initialised" in reason for reason in inserter.left_out.values())
    train(model, sample, torch.optim.SGD(model.parameters(), lr=0.0), inserter)
    before = outputs_of(model, sample)
    new = inserter.insert(path)
    assert torch.allclose(outputs_of(model, sample), before, rtol=0, atol=1e-6 * before.abs().max())
    old = dict(model.get_submodule(path).named_parameters())
    for entry, parameter in new.named_parameters():
        assert parameter.isfinite().all()
        assert entry in zero or not torch.equal(parameter, old[entry])
    train(model, sample, torch.optim.SGD(model.parameters(), lr=0.1))
    assert any(dict(new.named_parameters())[entry].any() for entry in zero)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_grown_language_models_keep_their_cache_and_their_configuration(name: str) -> None:
    model, sample = networks.build(name)
    inserter = LayerInsertion(model, sample=sample)
    train(model, sample, torch.optim.SGD(model.parameters(), lr=0.0), inserter)
    inserter.insert(inserter.select(inserter.merits()))
    assert model.config.num_hidden_layers == 3
    assert len(inserter.positions) == 3
    model.eval()
    ids = sample["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        first = model(input_ids=ids[:, :-1], use_cache=True)
        last = model(input_ids=ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    assert torch.allclose(whole, last, atol=1e-5)
    assert len(first.past_key_values) == 3
    again = type(model)(model.config)  # the configuration describes the grown model
    again.load_state_dict(model.state_dict())


def test_saved_with_its_records_a_grown_model_is_built_once(tmp_path: Path) -> None:
    from growkernels.integrations import transformers as integration

    model, sample = networks.build("llama")
    inserter = LayerInsertion(model, sample=sample)
    train(model, sample, torch.optim.SGD(model.parameters(), lr=0.0), inserter)
    inserter.insert("model.layers.0")
    setattr(model.config, integration.KEY, {"": insertions(model)})
    model.save_pretrained(tmp_path)
    loaded = integration.from_pretrained(type(model), tmp_path)
    assert loaded.config.num_hidden_layers == 3
    assert torch.equal(outputs_of(loaded, sample), outputs_of(model, sample))
    plain = type(model).from_pretrained(tmp_path)  # its configuration says it all
    assert torch.equal(outputs_of(plain, sample), outputs_of(model, sample))


def test_configurations_are_as_before_after_an_error() -> None:
    model, sample = networks.build("llama")
    inserter = LayerInsertion(model, sample=sample)
    train(model, sample, torch.optim.SGD(model.parameters(), lr=0.0), inserter)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="optimizer holds none"):
        inserter.insert("model.layers.0", other)
    assert model.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert len(model.model.layers) == 2


@pytest.mark.parametrize("name", ["hf_vit", "torch_encoder"])
def test_grown_models_compile(name: str) -> None:
    model, sample = networks.build(name)
    inserter = LayerInsertion(model, sample=sample)
    train(model, sample, torch.optim.SGD(model.parameters(), lr=0.0), inserter)
    inserter.insert(inserter.positions[0].name)
    inserter.close()
    model.eval()
    expected = outputs_of(model, sample)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.allclose(outputs_of(compiled, sample), expected, atol=1e-5)


def test_a_post_norm_model_is_refused() -> None:
    model, sample = networks.build("bert")
    with pytest.raises(ValueError, match=r"of 'bert.encoder.layer.0', it does not end in adding"):
        LayerInsertion(model, sample=sample)


@pytest.mark.parametrize(
    ("name", "path"), [("resnet18", "relu"), ("mobilenet", "features.4.block.2.activation")]
)
def test_layers_behind_relus_of_hand_written_forwards(name: str, path: str) -> None:
    model, sample = networks.build(name)
    inserter = LayerInsertion(model, [path], sample=sample)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    train(model, sample, optimizer, inserter)
    before = outputs_of(model, sample)
    inserter.insert(path, optimizer)
    after = outputs_of(model, sample)
    assert torch.allclose(after, before, rtol=0, atol=1e-6 * float(before.abs().max()))
    train(model, sample, optimizer)
