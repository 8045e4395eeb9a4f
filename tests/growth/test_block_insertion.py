"""Blocks of residual stacks that a test writes itself: what is refused, and what is kept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from growkernels.growth import LayerInsertion, grow_state, insertions, rebuild
from growkernels.growth.layer_insertion.traced_positions import traced_positions
from growkernels.nn.tracing import trace


class Block(nn.Module):
    """x + fc2(act(fc1(norm(x)))), called with a keyword argument and returning a tuple."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 6), nn.Linear(6, width)
        self.width = width

    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
        return x + self.fc2(F.silu(self.fc1(self.norm(x)) + shift)), None


class PostNorm(Block):
    def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
        return self.norm(x + self.fc2(F.silu(self.fc1(x) + shift))), None


class Model(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], mode: str = "all") -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(4, 2)
        self.mode = mode

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks if self.mode != "first" else list(self.blocks)[:2]:
            assert block.width == 4
            h = h if self.mode != "between" else h.relu()
            if self.mode == "checkpoint" and torch.is_grad_enabled():
                h, _ = checkpoint(block, h, shift=shift, use_reentrant=False)
            else:
                h, _ = block(h, shift=shift)
        out: Tensor = self.head(h)
        return out


SAMPLE = {"x": torch.arange(15.0).view(5, 3) / 15, "shift": torch.ones(())}


def model_of(kind: type[Block] = Block, mode: str = "all") -> Model:
    torch.manual_seed(0)
    return Model([kind(), kind()], mode)


def recorded(model: nn.Module, **settings: Any) -> LayerInsertion:
    inserter = LayerInsertion(model, sample=SAMPLE, **settings)
    with inserter.recording():
        model(**SAMPLE).square().mean().backward()
    return inserter


def test_found_positions_and_their_zero_layers() -> None:
    positions = LayerInsertion(model_of(), sample=SAMPLE).positions
    assert [(p.name, p.kind, p.template) for p in positions] == [
        ("blocks.0", "block", "blocks.0"),
        ("blocks.1", "block", "blocks.1"),
    ]
    assert positions[0].zero == ("fc2.weight", "fc2.bias")
    assert [p.name for p in LayerInsertion(model_of(), ["blocks.1"], sample=SAMPLE).positions] == [
        "blocks.1"
    ]


def test_attributes_keywords_and_tuples_go_on_working() -> None:
    model = model_of()
    inserter = recorded(model)
    before = model(**SAMPLE)
    inserter.insert("blocks.0")
    with inserter.recording():
        model(**SAMPLE).square().mean().backward()
    inserter.insert("blocks.1")
    assert [p.name for p in inserter.positions] == [f"blocks.{i}" for i in range(4)]
    assert torch.equal(model(**SAMPLE), before)
    other = model_of()
    rebuild(other, insertions(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**SAMPLE), before)
    grown, _ = grow_state(insertions(model), model_of().state_dict(), build=model_of)
    assert all(torch.equal(grown[name], value) for name, value in model.state_dict().items())


def test_new_parameters_join_the_groups_of_those_they_copy() -> None:
    model = model_of()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": plain, "weight_decay": 0.0}, {"params": decayed}])
    inserter = recorded(model)
    optimizer.step()
    state = dict(optimizer.state)
    new = inserter.insert("blocks.1", optimizer)
    groups = [{id(p) for p in group["params"]} for group in optimizer.param_groups]
    for parameter in new.parameters():
        assert (id(parameter) in groups[0]) == (parameter.dim() <= 1)
        assert (id(parameter) in groups[1]) == (parameter.dim() > 1)
        assert parameter.grad is None
    assert all(optimizer.state[p] is state[p] for p in state)


def test_checkpointed_blocks_have_the_same_merit() -> None:
    plain, checkpointed = recorded(model_of()).merits(), recorded(model_of(mode="checkpoint"))
    assert torch.equal(checkpointed.merits().values, plain.values)


def test_recording_draws_no_random_numbers_and_leaves_gradients() -> None:
    model = model_of()
    model.blocks[1].fc1 = nn.Sequential(nn.Dropout(0.5), model.blocks[1].fc1)
    inserter = LayerInsertion(model, sample=SAMPLE)
    torch.manual_seed(1)
    model(**SAMPLE).square().mean().backward()
    state, grads = torch.get_rng_state(), [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    with inserter.recording():
        model(**SAMPLE).square().mean().backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_a_post_norm_block_is_refused_with_its_reason() -> None:
    with pytest.raises(ValueError, match=r"of 'blocks.0', it does not end in adding .*layer_norm"):
        LayerInsertion(model_of(PostNorm), sample=SAMPLE)
    with pytest.raises(
        ValueError, match=r"of 'blocks.0', with these parameters at zero it changes"
    ):
        LayerInsertion(model_of(PostNorm), sample=SAMPLE, zero=["fc2"])
    with pytest.raises(ValueError, match=r"'blocks.0': it does not hand its output on to the next"):
        LayerInsertion(model_of(mode="between"), {"blocks.0": "block"}, sample=SAMPLE)
    with pytest.raises(
        ValueError, match=r"No block can be inserted behind 'blocks.0': it does not"
    ):
        LayerInsertion(model_of(PostNorm), {"blocks.0": "block"}, sample=SAMPLE)


def test_zero_names_the_layers() -> None:
    class Hidden(Block):
        def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
            return torch.stack([x, super().forward(x, shift=shift)[0] - x]).sum(0), None

    model = model_of(Hidden)
    with pytest.raises(ValueError, match="does not end in adding to its input"):
        LayerInsertion(model, sample=SAMPLE)
    inserter = recorded(model, zero=["fc2"])
    assert torch.equal(inserter.merits().values, recorded(model_of()).merits().values)
    with pytest.raises(TypeError, match="zero is the string 'fc2'; give a list"):
        LayerInsertion(model, sample=SAMPLE, zero="fc2")
    with pytest.raises(ValueError, match="pass sample="):
        LayerInsertion(model, zero=["fc2"])


def tied(model: Model) -> None:
    model.blocks[1].fc2.weight = model.blocks[0].fc2.weight


def hooked(model: Model) -> None:
    for block in model.blocks:
        block.norm.register_forward_hook(print)


def computed(model: Model) -> None:
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.fc1)


def uncopyable(model: Model) -> None:
    for block in model.blocks:
        block.lock = (entry for entry in ())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (tied, "'fc2.weight' is also used at 'blocks.1.fc2.weight'"),
        (hooked, "'norm' carries hooks"),
        (computed, "of 'fc1' its weight is computed by a parametrization"),
        (uncopyable, "copy.deepcopy raises TypeError"),
    ],
)
def test_blocks_that_cannot_be_copied(change: Any, reason: str) -> None:
    model = model_of()
    change(model)
    positions, left_out = traced_positions(model, SAMPLE)
    assert positions == []
    assert reason in left_out["blocks.0"].replace("blocks.0.fc2", "fc2")


def test_a_forward_that_does_not_run_the_new_block_is_found_out() -> None:
    model = model_of(mode="first")
    before = dict(model.named_modules())
    positions, left_out = traced_positions(model, SAMPLE)
    assert positions == []
    assert "does not run one more block there as it runs the others" in left_out["blocks.0"]
    assert dict(model.named_modules()) == before
    model.mode = "all"
    inserter = recorded(model)
    model.mode = "first"  # the user's doing, after the positions were found
    optimizer = torch.optim.SGD(model.parameters())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=r"behind 'blocks\.1' ran 0 times in one pass of the model"
    ):
        inserter.insert("blocks.1", optimizer)
    assert list(model.state_dict()) == list(state)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    assert insertions(model) == []
    assert [p.name for p in inserter.positions] == ["blocks.0", "blocks.1"]


def test_a_merit_under_autocast_is_taken_under_it() -> None:
    model = model_of()
    inserter = LayerInsertion(model, sample=SAMPLE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**SAMPLE).float().square().mean()
    with inserter.recording():
        loss.backward()
    exact = recorded(model_of()).merits().values
    assert torch.allclose(inserter.merits().values, exact, rtol=0.05)


def test_frozen_blocks_are_copied_into_trained_ones() -> None:
    model = model_of()
    model.blocks.requires_grad_(False)
    model.embed.requires_grad_(True)
    new = recorded(model).insert("blocks.0")
    assert all(p.requires_grad for p in new.parameters())
    model.blocks[0].fc2.requires_grad_(True)
    model.blocks[0].norm.requires_grad_(True)
    new = recorded(model).insert("blocks.0")
    assert not new.fc1.weight.requires_grad
    assert new.fc2.weight.requires_grad


def test_parallel_branches() -> None:
    class Parallel(Block):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(4, 4)

        def forward(self, x: Tensor, *, shift: Tensor) -> tuple[Tensor, None]:
            branches = self.other(x) + self.fc2(F.silu(self.fc1(self.norm(x)) + shift))
            return branches + x, None

    model = model_of(Parallel)
    inserter = recorded(model)
    assert inserter.positions[0].zero == ("fc2.weight", "fc2.bias", "other.weight", "other.bias")
    extended = copy.deepcopy(model)
    extended.blocks.insert(1, copy.deepcopy(extended.blocks[0]))
    weights = [
        p for m in (extended.blocks[1].fc2, extended.blocks[1].other) for p in m.parameters()
    ]
    for weight in weights:
        weight.data.zero_()
    grads = torch.autograd.grad(extended(**SAMPLE).square().mean(), weights)
    expected = sum(float(grad.square().sum()) for grad in grads)
    assert float(inserter.merits().values[0]) == pytest.approx(expected, rel=1e-5)


def test_other_norms_are_refused() -> None:
    with pytest.raises(ValueError, match="norm='operator' compares layers of one matrix each"):
        LayerInsertion(model_of(), sample=SAMPLE, norm="operator")


def test_copies_and_closed_drivers_leave_nothing_behind() -> None:
    model = model_of()
    inserter = recorded(model)
    other = copy.deepcopy(model)
    assert [p.name for p in LayerInsertion(other, sample=SAMPLE).positions] == [
        "blocks.0",
        "blocks.1",
    ]
    inserter.insert("blocks.0")
    inserter.close()
    assert not any(m._forward_hooks for m in model.modules())
    other(**SAMPLE)
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in other.modules())


class Convolutions(nn.Module):
    """A hand-written forward with ReLU modules: one that runs once, one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.twice = nn.ReLU(), nn.ReLU()
        self.fc = nn.Linear(4, 4)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.conv1(x))
        h = self.twice(self.conv2(h)).mean((2, 3))
        out: Tensor = F.relu(self.twice(self.fc(h)))
        return out


def test_relus_in_a_hand_written_forward() -> None:
    model, x = Convolutions(), torch.randn(2, 3, 8, 8)
    inserter = LayerInsertion(model, sample=x)
    assert [(p.name, p.kind) for p in inserter.positions] == [("relu", "conv2d_relu")]
    assert inserter.left_out == {
        "twice": "it runs 2 times in one pass, and an inserted layer would too",
        "": "its forward calls relu as a function, on what 'twice' makes, which runs 2 times in "
        "one pass; make it an nn.ReLU",
    }
    with inserter.recording():
        model(x).sum().backward()
    before = model(x)
    inserter.insert("relu")
    assert torch.equal(model(x), before)


def test_residual_layers_do_not_fit_feature_maps() -> None:
    with pytest.raises(ValueError, match=r"'conv1' makes feature maps \[N, C, H, W\]"):
        LayerInsertion(Convolutions(), {"conv1": "residual"})


def test_an_overwritten_view_is_not_followed() -> None:
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h[:, :3] += 1
            out: Tensor = self.b(h)
            return out

    from growkernels.growth.traced_graph import traced

    graph = traced(Overwritten(), torch.randn(2, 4))
    assert graph.why_fixed("a") is not None
    assert len(trace(Overwritten(), torch.randn(2, 4)).calls) == 3
