"""Blocks that are drawn anew instead of copied."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth import LayerInsertion, grow_state, insertions, rebuild


class Block(nn.Module):
    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.full((6,), 0.5)) if own else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.fc1(self.norm(x)))
        h = h if self.scale is None else h * self.scale
        out: Tensor = x + self.fc2(h)
        return out


class Model(nn.Module):
    def __init__(self, own: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block(own) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        out: Tensor = self.head(h)
        return out


class Initialised(Model):
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)
        if isinstance(module, Block) and module.scale is not None:
            nn.init.ones_(module.scale)


X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def trained(kind: type[Model] = Model, own: bool = False) -> Model:
    torch.manual_seed(0)
    model = kind(own)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    model(X)  # running statistics
    return model


def recorded(model: nn.Module, **settings: Any) -> LayerInsertion:
    inserter = LayerInsertion(model, sample=X, init="fresh", **settings)
    with inserter.recording():
        model(X).square().mean().backward()
    return inserter


def test_a_fresh_block_is_the_identity_and_starts_as_a_new_one() -> None:
    model = trained()
    state = torch.get_rng_state()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inserter = recorded(model)
    again = recorded(model)
    assert torch.equal(inserter.merits().values, again.merits().values)
    again.close()
    record = inserter.record("blocks.0")
    saved = copy.deepcopy(model.state_dict())
    expected = float(inserter.merits().values[0])
    before = model.eval()(X)
    new = inserter.insert("blocks.0", optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.eval()(X), before)
    assert isinstance(new, Block)
    assert not new.fc2.weight.any()
    assert new.fc1.weight.abs().max() <= 0.5  # of Linear(4, 6), and 1 was added to the others
    assert torch.equal(new.norm.weight, torch.ones(4))
    assert torch.equal(new.norm.running_mean, torch.zeros(4))
    # The merit is that of these very values.
    model.train()
    model.zero_grad()
    model(X).square().mean().backward()
    grads = [p.grad for p in new.fc2.parameters() if p.grad is not None]
    assert sum(float(g.square().sum()) for g in grads) == pytest.approx(expected, rel=1e-5)
    other = trained()
    rebuild(other, insertions(model))
    assert torch.equal(other.blocks[1].fc1.weight, new.fc1.weight)
    grown, _ = grow_state(record, saved, build=trained)
    for name, value in model.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(grown[name], value)


def test_no_two_fresh_blocks_are_alike() -> None:
    for positions in (None, ["blocks.0"]):
        model = trained()
        inserter = recorded(model, positions=positions)
        first = inserter.insert("blocks.0")
        with inserter.recording():
            model(X).square().mean().backward()
        second = inserter.insert("blocks.1")
        assert not torch.equal(first.fc1.weight, second.fc1.weight)
        other = LayerInsertion(trained(), sample=X, init="fresh", seed=1)
        seeds = {p.seed for p in (*other.positions, *LayerInsertion(trained(), sample=X).positions)}
        assert len(seeds) == 3


def test_the_models_own_init_weights_is_asked() -> None:
    new = recorded(trained(Initialised, own=True)).insert("blocks.1")
    assert torch.equal(new.fc1.weight, torch.full((6, 4), 0.25))
    assert torch.equal(new.scale, torch.ones(6))


def test_what_nobody_initialises_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'blocks\.0' cannot be initialised anew: its 'scale'"):
        LayerInsertion(trained(own=True), sample=X, init="fresh")
    with pytest.raises(ValueError, match="Unknown init 'new'"):
        LayerInsertion(trained(), sample=X, init="new")


def test_transformers_initialise_their_blocks() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, initializer_range=0.5,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    ids = torch.randint(0, 40, (2, 5))
    inserter = LayerInsertion(model, sample={"input_ids": ids}, init="fresh")
    with inserter.recording():
        model(input_ids=ids, labels=ids).loss.backward()
    new = inserter.insert("transformer.h.1")
    assert not new.mlp.c_proj.weight.any()
    assert not new.mlp.c_fc.bias.any()
    weight = new.mlp.c_fc.weight
    assert float(weight.detach().std()) == pytest.approx(0.5, rel=0.1)
    assert abs(float(weight.detach().mean())) < 0.1
