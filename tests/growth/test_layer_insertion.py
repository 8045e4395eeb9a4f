"""The driver from end to end: drop-in use, selection, recording errors, wrapped models."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from small_networks import batches, cnn, mlp, recorded, resnet
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training import record

from growkernels.growth import LayerInsertion, Merits, insertions
from growkernels.nn import Conv2dReLU, ResidualBlock


def merits(values: list[float], base: float = 1.0) -> Merits:
    names = tuple("abcdef"[: len(values)])
    return Merits(names, torch.tensor(values).double(), base, None, 1, "frobenius")


def test_drop_in_example() -> None:
    model, loss_fn = mlp(dtype=torch.float32), nn.CrossEntropyLoss()
    loader = batches(model, 3, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inserter = LayerInsertion(model)
    for epoch in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        if epoch == 1:
            for x, y in loader:
                with inserter.recording():
                    loss_fn(model(x), y).backward()
            position = inserter.select(inserter.merits())
            assert position is not None
            inserter.insert(position, optimizer, sample=loader[0][0])
    assert len(list(model)) == 6
    assert all(p in optimizer.state for p in model.parameters())


@pytest.mark.parametrize("build", [mlp, resnet, cnn])
def test_three_insertions_keep_the_function(build: type[nn.Sequential]) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inserter = LayerInsertion(model)
    candidates = len(inserter.positions)
    (x, y), *_ = batches(model, 1, 10)
    for number in range(3):
        with inserter.recording():
            F.cross_entropy(model(x), y).backward()
        choice = inserter.select(inserter.merits())
        assert choice is not None
        before = model.eval()(x).detach()
        new = inserter.insert(choice, optimizer)
        change = (model(x) - before).detach().abs().max()
        assert float(change) <= 1e-6 * float(before.abs().max())
        model.train()
        assert len(inserter.positions) == candidates + number + 1
        assert len(insertions(model)) == number + 1
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters()}
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(held)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        old = [p.detach().clone() for p in new.parameters()]
        optimizer.step()
        assert any(not torch.equal(a, b) for a, b in zip(old, new.parameters(), strict=True))
        optimizer.zero_grad()


def test_selection_rules() -> None:
    inserter = LayerInsertion(mlp())
    assert inserter.select(merits([1.0, 3.0, 3.0])) == "b"
    assert inserter.select(merits([1.0, 3.0]), rule="relative", tau=3.0) == "b"
    assert inserter.select(merits([1.0, 3.0]), rule="relative", tau=3.1) is None
    assert "declined" in inserter.reason
    assert inserter.select(merits([0.0, 0.0], base=0.0), rule="relative") is None
    with pytest.raises(ValueError, match="The merit at 'b', 'c' is NaN or infinite"):
        inserter.select(merits([1.0, math.nan, math.inf]))
    with pytest.raises(ValueError, match="no base-layer merit"):
        inserter.select(merits([1.0], base=math.nan), rule="relative")
    with pytest.raises(ValueError, match="Unknown rule 'min'"):
        inserter.select(merits([1.0]), rule="min")
    assert merits([1.0, 2.0]).note is None
    assert "largest and the smallest merit are the same" in (merits([1.0]).note or "")


def test_declined_insertion_is_refused_with_the_reason() -> None:
    inserter = recorded(mlp(), count=2)
    assert inserter.select(inserter.merits(), rule="relative", tau=1e9) is None
    with pytest.raises(ValueError, match="declined, below tau"):
        inserter.insert(None)  # type: ignore[arg-type]


def test_nan_gradients_leave_everything_untouched() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inserter = LayerInsertion(model)
    with inserter.recording():
        (model(batches(model, 1, 5)[0][0]).sum() * math.nan).backward()
    taken = inserter.merits()
    assert taken.values.isnan().all()
    with pytest.raises(ValueError, match="'1', '3' is NaN"):
        inserter.select(taken)
    with pytest.raises(ValueError, match="recorded at '3' is NaN"):
        inserter.insert("3", optimizer)
    assert len(list(model)) == 5
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_nothing_recorded_and_wrong_positions() -> None:
    inserter = LayerInsertion(mlp())
    with pytest.raises(RuntimeError, match="No batches are recorded"):
        inserter.merits()
    with pytest.raises(RuntimeError, match="No batches are recorded"):
        inserter.insert("1")
    with pytest.raises(ValueError, match="'7' is not a candidate position; they are: '1', '3'"):
        inserter.insert("7")
    with (
        pytest.raises(RuntimeError, match="No gradient reached position '1'"),
        inserter.recording(),
    ):
        pass
    inserter = recorded(mlp(), count=2)
    inserter.reset()
    with pytest.raises(RuntimeError, match="No batches are recorded"):
        inserter.merits()


def test_a_failing_batch_is_not_counted() -> None:
    model = mlp()
    inserter = recorded(model, count=2)
    expected = inserter.merits()
    x, y = batches(model, 1, 4)[0]

    def record(batches_in_one: int, fail: bool) -> None:
        with inserter.recording():
            for _ in range(batches_in_one):
                F.cross_entropy(model(x), y).backward()
            if fail:
                raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        record(1, fail=True)
    with pytest.raises(RuntimeError, match="more than one gradient"):
        record(2, fail=False)
    again = inserter.merits()
    assert torch.equal(again.values, expected.values)
    assert again.base == expected.base
    assert again.batches == 2
    record(1, fail=False)
    assert inserter.merits().batches == 3


def test_open_recordings() -> None:
    model = mlp()
    inserter = LayerInsertion(model)
    with inserter.recording():
        with pytest.raises(RuntimeError, match="already open"), inserter.recording():
            pass
        with pytest.raises(RuntimeError, match="still open"):
            inserter.insert("1")
        model(batches(model, 1, 4)[0][0]).sum().backward()
    assert inserter.merits().batches == 1
    with pytest.raises(ValueError, match="loss_scale is 0"), inserter.recording(loss_scale=0):
        pass


def test_in_place_changes_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    inserter = LayerInsertion(model, {"0": "residual"})
    with pytest.raises(RuntimeError, match="'0' was changed in place"), inserter.recording():
        model(batches(model, 1, 4)[0][0]).sum().backward()


def test_a_module_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = ResidualBlock(2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.block(self.block(x))
            return out

    model = Twice()
    inserter = LayerInsertion(model)
    with (
        pytest.raises(RuntimeError, match="'block' got more than one gradient"),
        inserter.recording(),
    ):
        model(torch.randn(3, 2)).sum().backward()


def test_frozen_parameters() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    x = batches(model, 1, 4)[0][0]
    inserter = LayerInsertion(model)
    with (
        pytest.raises(RuntimeError, match="'1' has no gradient because everything in front"),
        inserter.recording(),
    ):
        model(x).sum().backward()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    inserter = LayerInsertion(model, ["3"])
    model.zero_grad()
    with inserter.recording():
        model(x).sum().backward()
    weights = [model[2].weight.grad, model[4].weight.grad]
    expected = sum(float(w.square().sum()) for w in weights) / 2
    assert inserter.merits().base == pytest.approx(expected)
    inserter.insert("3", optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 6


def test_tied_weights_count_once() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(3, 2)).double()
    inserter = LayerInsertion(model)
    with inserter.recording():
        model(torch.randn(5, 3).double()).square().sum().backward()
    weights = [first.weight, model[4].weight]
    expected = sum(float(w.grad.square().sum()) for w in weights) / 2  # type: ignore[union-attr]
    assert inserter.merits().base == pytest.approx(expected)


def test_tied_convolutions_that_are_positions() -> None:
    first, second = Conv2dReLU(3, 3, 3, padding=1), Conv2dReLU(3, 3, 3, padding=1)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    inserter = LayerInsertion(model, norm="operator")
    with inserter.recording():
        model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert inserter.merits().names == ("0", "1")
    assert math.isfinite(inserter.merits().base)


def test_a_model_changed_by_others_is_noticed() -> None:
    model = mlp()
    first, second = recorded(model), recorded(model)
    first.insert("1")
    with pytest.raises(RuntimeError, match="'3' is not the one that was recorded"):
        second.insert("3")
    assert len(list(model)) == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = mlp()
    x, y = batches(model, 1, 10)[0]
    expected = recorded(model).merits()
    inserter = LayerInsertion(model)
    x.requires_grad_()
    with inserter.recording():
        logits = model[4](checkpoint(model[:4], x, use_reentrant=reentrant))
        F.cross_entropy(logits, y).backward()
    torch.testing.assert_close(inserter.merits().values, expected.values)


def test_negative_outputs_do_not_suit_a_relu_layer() -> None:
    model = mlp()
    inserter = LayerInsertion(model, {"2": "linear_relu"})
    with inserter.recording():
        model(batches(model, 1, 8)[0][0]).sum().backward()
    with pytest.raises(ValueError, match="'2' has negative outputs"):
        inserter.merits()
    with pytest.raises(RuntimeError, match="would not be the identity"):
        inserter.insert("2")
    assert len(list(model)) == 5
    assert insertions(model) == []


def test_outputs_that_are_no_tensors() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x)[0]

    model = Model()
    inserter = LayerInsertion(model, {"pair": "residual"})
    with pytest.raises(RuntimeError, match="'pair' returns a tuple"), inserter.recording():
        model(torch.randn(3, 2)).sum().backward()


def test_named_positions_follow_their_modules() -> None:
    model = mlp()
    inserter = recorded(model, ["1", "3"])
    new = inserter.insert("1")
    assert [p.name for p in inserter.positions] == ["1", "2", "4"]
    assert model[2] is new


def test_copies_and_pickles_of_a_watched_model_do_not_record() -> None:
    model = mlp()
    inserter = LayerInsertion(model)
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = batches(model, 1, 4)[0][0]
    with inserter.recording():
        for network in (twin, loaded, model):
            network(x).sum().backward()
    assert inserter.merits().batches == 1
    inserter.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_compiled_models() -> None:
    model = mlp(dtype=torch.float32)
    (x, y), *_ = batches(model, 1, 6)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(TypeError, match=r"pass the plain module \(compiled._orig_mod\)"):
        LayerInsertion(compiled)  # type: ignore[arg-type]
    inserter = LayerInsertion(model)
    compiled(x)
    with pytest.raises(RuntimeError, match="the model ran compiled"), inserter.recording():
        F.cross_entropy(compiled(x), y).backward()
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    new = inserter.insert("1")
    with torch.no_grad():
        new.weight.mul_(2.0)  # type: ignore[operator]
    again = torch.compile(model, backend="eager")
    torch.testing.assert_close(again(x), model(x))
    inside = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), torch.compile(nn.Linear(2, 2)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Module '2' is compiled"):
        LayerInsertion(inside)
    in_place = mlp()
    in_place.compile()
    with pytest.raises(TypeError, match="The model is compiled"):
        LayerInsertion(in_place)


def test_single_candidate() -> None:
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
    assert "one candidate position only ('1')" in (recorded(model, count=2).merits().note or "")


@pytest.mark.parametrize("build", [mlp, resnet, cnn])
def test_large_networks_are_taken_piece_by_piece(
    build: type[nn.Sequential], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that do not wait for the end of the batch give what those that wait give."""
    model = build()
    together = recorded(model, count=3).merits()
    monkeypatch.setattr("growkernels.growth.layer_insertion.recorder.WAITING_BYTES", 0)
    inserter = recorded(model, count=3)
    apart = inserter.merits()
    torch.testing.assert_close(apart.values, together.values, rtol=1e-12, atol=0)
    assert apart.base == pytest.approx(together.base, rel=1e-12)
    assert apart.snr is not None
    assert together.snr is not None
    torch.testing.assert_close(apart.snr, together.snr, rtol=1e-9, atol=0)
    inserter.reset()
    record(inserter, batches(model, 3, 10))
    again = inserter.merits()  # into the buffers that the first recording left
    assert torch.equal(again.values, apart.values)
    assert again.base == apart.base
