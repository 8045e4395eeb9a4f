"""Growing: the function stays, training goes on, checkpoints resume, and errors undo everything."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scaling_networks import batches, grow_once, parameters, small_cnn, small_deit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import LBFGS, SGD, Adafactor, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from training import adamw, check_that_training_resumes, record, train

from growkernels.growth import LayerInsertion, NeuronScaling, insertions, rebuild

ALL_WIDTHS = ("fc1", "v", "qk")


def sgd(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.005, momentum=0.9)


def scaling_of(model: nn.Module, **options: Any) -> NeuronScaling:
    kinds = ("conv2d",) if isinstance(model, nn.Sequential) else ("linear",)
    return NeuronScaling(model, kinds=kinds, generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize(
    ("init", "dtype", "tolerance"),
    [("parent", torch.float64, 1e-13), ("eigenvector", torch.float32, 1e-5)],
)
@pytest.mark.parametrize(
    ("form", "depth", "widen"),
    [
        ("pair", True, ()),
        ("single", True, ALL_WIDTHS),
        ("gated", True, ALL_WIDTHS),
        ("single", False, ("fc1",)),
        ("single", False, ("v",)),
        ("single", False, ("qk",)),
    ],
)
def test_the_function_stays_over_growth_after_growth(
    init: str,
    dtype: torch.dtype,
    tolerance: float,
    form: str,
    depth: bool,
    widen: tuple[str, ...],
) -> None:
    model = small_deit(dtype)
    optimizer = adamw(model)
    scaling = scaling_of(model, form=form, depth=depth, widen=widen)
    x = batches(model, 1, seed=9)[0][0]
    for _ in range(3):
        train(
            model, optimizer, batches(model, 3, seed=5)
        )  # so that nothing that was added is still 0
        with torch.no_grad():
            before = model(x)
        size = parameters(model)
        added = grow_once(scaling, 600, optimizer, init)
        assert parameters(model) == size + added > size + 100
        with torch.no_grad():
            error = float((model(x) - before).abs().max() / before.abs().max())
        assert error <= tolerance
    if depth:
        assert any(layer.count("branches") == 2 for layer in scaling.layers)


@pytest.mark.parametrize("form", ["single", "gated"])
def test_everything_that_is_new_trains(form: str) -> None:
    """What starts at 0 has a gradient at once, everything else after one step.

    But for what adds the same to every key: a softmax does not see it, and its gradient is 0 or
    rounding noise. The bias of a key's branch does so as long as the branch computes 0.
    """
    model = small_deit()
    optimizer = SGD(model.parameters(), lr=0.01)
    scaling = scaling_of(model, form=form, widen=ALL_WIDTHS)
    train(model, optimizer, batches(model, 3, seed=5))  # biases start at 0
    old = {name: value.detach().clone() for name, value in model.named_parameters()}
    grow_once(scaling, 2000, optimizer)
    new = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name not in old or parameter.shape != old[name].shape
    }
    data = batches(model, 1, size=20)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0][0]), data[0][1]).backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(grad is not None for grad in grads.values())
        noise = 1e-12 * max(float(grad.abs().max()) for grad in grads.values() if grad is not None)
        for name, parameter in new.items():
            assert parameter.grad is not None
            idle = parameter.grad.abs() <= noise
            if name.endswith("k.bias") or (step == 0 and re.search(r"k\.branches.*bias$", name)):
                assert bool(idle.all()), (step, name)
                continue
            if step == 0:
                idle = idle & (parameter.detach() == 0)
                if form == "gated" and name.endswith(("linear.weight", "linear.bias")):
                    continue
            assert not bool(idle.any()), (step, name)
        optimizer.step()


def test_new_values_come_from_the_parent_or_the_eigenvector() -> None:
    model = small_deit()
    scaling = scaling_of(model, form="pair", layers=["blocks.0.attn.proj"])
    record(scaling, batches(model, 2))
    scores = scaling.scores()
    chosen = scaling.select(scores, 10**4, min_eligible=1)
    outputs = list(chosen.neurons["blocks.0.attn.proj"])
    twin = copy.deepcopy(model)
    scaling.grow(chosen, init="parent", scale=0.3)
    state = {name.removeprefix("blocks.0.attn.proj."): v for name, v in model.state_dict().items()}
    torch.testing.assert_close(state["branches.0.plus.weight"], 0.3 * state["weight"][outputs])
    torch.testing.assert_close(state["branches.0.minus.bias"], -0.3 * state["bias"][outputs])

    other = scaling_of(twin, form="gated", layers=["blocks.0.attn.proj"])
    other.grow(chosen, init="eigenvector")
    branch = dict(twin.named_parameters())["blocks.0.attn.proj.branches.0.linear.weight"].detach()
    norm = float(state["weight"].norm(dim=1).square().mean().sqrt())
    direction = scores.directions["blocks.0.attn.proj"][outputs]
    torch.testing.assert_close(branch, 0.2 * norm * direction)


def test_heads_keep_their_features_when_v_q_and_k_widen() -> None:
    """Old rows of each head stay in front of its new ones, and the softmax scale stays."""
    model = small_deit()
    old = {name: value.detach().clone() for name, value in model.named_parameters()}
    scale = model.get_submodule("blocks.0.attn").scale
    scaling = scaling_of(
        model, depth=False, widen=("v", "qk"), layers=["blocks.0.attn.q", "blocks.0.attn.v"]
    )
    record(scaling, batches(model, 1))
    scores = scaling.scores()
    for values in scores.values.values():
        values.copy_(-torch.arange(1.0, 7.0))
    scaling.grow(scaling.select(scores, 3 * (2 * 13 + 13 + 12), min_eligible=1))
    new = dict(model.named_parameters())
    assert model.get_submodule("blocks.0.attn").scale == scale
    for letter, best in (("q", [1, 3, 5]), ("v", [1, 3, 5]), ("k", None)):
        name = f"blocks.0.attn.{letter}.weight"
        rows = new[name].detach().view(3, 3, 12)
        assert torch.equal(rows[:, :2].reshape(6, 12), old[name])
        expected = torch.zeros(3, 12) if best is None else 0.2 * old[name][best]
        torch.testing.assert_close(rows[:, 2], expected.double())
    columns = new["blocks.0.attn.proj.weight"].detach().view(12, 3, 3)
    assert torch.equal(columns[:, :, :2].reshape(12, 6), old["blocks.0.attn.proj.weight"])
    assert not columns[:, :, 2].any()


def test_branches_follow_the_outputs_that_widening_moves() -> None:
    model = small_deit()
    optimizer = sgd(model)
    for widen in ((), ("v",), ("v",)):
        scaling = scaling_of(model, widen=widen, layers=["blocks.0.attn.v"])
        grow_once(scaling, 1000, optimizer)  # compares the outputs
        scaling.close()
        train(model, optimizer, batches(model, 3, seed=5))
    assert len(scaling.layers) > 3
    assert model.get_submodule("blocks.0.attn.v").out_features > 6


@pytest.mark.parametrize("build_optimizer", [sgd, adamw])
@pytest.mark.parametrize("form", ["pair", "single", "gated"])
@pytest.mark.parametrize("build", [small_deit, small_cnn])
def test_resumed_training_is_bit_equal(
    build: Callable[[], nn.Module], form: str, build_optimizer: Callable[[nn.Module], Optimizer]
) -> None:
    model = build()
    optimizer = build_optimizer(model)
    widen = ALL_WIDTHS if build is small_deit else ()
    scaling = scaling_of(model, form=form, widen=widen)
    scheduler = StepLR(optimizer, 1, gamma=0.7)
    for _ in range(2):
        train(model, optimizer, batches(model, 3, seed=5))
        grow_once(scaling, 600, optimizer)
        scheduler.step()
    train(model, optimizer, batches(model, 3, seed=5))

    watching: list[NeuronScaling] = []

    def look_at(resumed: nn.Module) -> None:
        # Watched branches are computed one by one, so both models are watched.
        watching.append(scaling_of(resumed, form=form, widen=widen))
        assert watching[-1].layers == scaling.layers

    check_that_training_resumes(
        model, optimizer, scheduler, build, build_optimizer, batches(model, 3, seed=6), look_at
    )


def test_inserted_layers_and_grown_neurons_rebuild_in_order() -> None:
    def base() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4)).double()

    model = base()
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    inserter = LayerInsertion(model)
    with inserter.recording():
        F.cross_entropy(model(x), y).backward()
    inserter.insert("1")
    inserter.close()
    scaling = NeuronScaling(model, "magnitude")
    scaling.grow(scaling.select(scaling.scores(), 10, min_eligible=1), sample=x)
    assert [record["kind"] for record in insertions(model)] == ["linear_relu", "neurons"]
    twin = base()
    rebuild(twin, insertions(model))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    with pytest.raises(ValueError, match="no linear layer or convolution to grow at '9'"):
        rebuild(twin, [{**insertions(model)[1], "depth": {"9": [0]}}])
    with pytest.raises(ValueError, match="grows output 7 of layer '0', which has 5"):
        rebuild(twin, [{**insertions(model)[1], "depth": {"0": [7]}}])
    assert torch.equal(twin(x), model(x))


def test_optimizer_state_stays_and_follows_widened_parameters() -> None:
    model = small_deit()
    optimizer = adamw(model)
    train(model, optimizer, batches(model, 3, seed=5))
    state = {
        name: {key: value.clone() for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids = {name: id(p) for name, p in model.named_parameters()}
    scaling = scaling_of(model, form="single", widen=("v", "fc1"))
    grow_once(scaling, 1500, optimizer)
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    widened = 0
    for name, parameter in model.named_parameters():
        decay = held[id(parameter)]["weight_decay"]
        assert decay == (0.1 if parameter.dim() > 1 else 0.0)
        if name not in state:
            assert "branches" in name
            assert all(not value.any() for value in optimizer.state[parameter].values())
            continue
        now, before = optimizer.state[parameter], state[name]
        assert float(now["step"]) == 3
        if parameter.shape == old[name].shape:
            assert id(parameter) == ids[name]
            assert torch.equal(now["exp_avg"], before["exp_avg"])
            continue
        widened += 1
        # Old entries are those that hold the old values; the momenta of new ones start at 0.
        assert now["exp_avg"].shape == now["exp_avg_sq"].shape == parameter.shape
        kept = torch.isin(parameter.detach(), old[name])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(now[key][kept], before[key].flatten())
        assert not now["exp_avg"][~kept].any()
        mean = float(before["exp_avg_sq"].mean())
        assert float(now["exp_avg_sq"][~kept].mean()) == pytest.approx(mean, rel=1e-6)
    assert widened >= 6
    assert len(optimizer.state) == len(list(model.parameters()))


def test_a_grown_network_trains_as_before_while_its_new_weights_stand_still() -> None:
    """The widened parameters' momenta go on: same steps, with the new entries held at 0."""
    model = small_deit()
    optimizer = sgd(model)
    train(model, optimizer, batches(model, 3, seed=5))
    twin, x = copy.deepcopy(model), batches(model, 1, seed=9)[0][0]
    twin_optimizer = sgd(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # it takes the tensors
    scaling = scaling_of(model, depth=False, widen=("fc1",))
    old = {name: p.shape for name, p in model.named_parameters()}
    grow_once(scaling, 500, optimizer)
    for name, parameter in model.named_parameters():
        if parameter.shape != old[name]:
            rows, columns = old[name][0], old[name][-1]
            mask = torch.zeros_like(parameter)
            mask[(slice(rows), slice(columns)) if parameter.dim() == 2 else slice(rows)] = 1
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
    train(model, optimizer, batches(model, 3, seed=5))
    train(twin, twin_optimizer, batches(twin, 3, seed=5))
    torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-12)


def everything(model: nn.Module, optimizer: Optimizer | None) -> tuple[Any, ...]:
    groups = (
        [] if optimizer is None else [list(map(id, g["params"])) for g in optimizer.param_groups]
    )
    state = [] if optimizer is None else list(map(id, optimizer.state))
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    named = [(name, id(p), p.shape) for name, p in model.named_parameters()]
    return groups, state, modules, named, insertions(model)


@pytest.mark.parametrize("kind", [AdamW, Adafactor, LBFGS])
def test_an_error_leaves_model_and_optimizer_as_they_were(
    kind: type[Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_deit()
    optimizer = kind(model.parameters())  # type: ignore[call-arg]
    if kind is not LBFGS:
        train(model, optimizer, batches(model, 3, seed=5))
    scaling = scaling_of(model, form="pair", widen=ALL_WIDTHS)
    data = batches(model, 1)
    record(scaling, data)
    chosen = scaling.select(scaling.scores(), 2000, min_eligible=1)
    before, layers = everything(model, optimizer), scaling.layers
    output: Tensor = model(data[0][0])
    if kind is AdamW:

        def broken(*_: object) -> None:
            raise RuntimeError("it changed")

        target = "growkernels.growth.neuron_scaling.driver.check_same_output"
        with monkeypatch.context() as patch:
            patch.setattr(target, broken)
            with pytest.raises(RuntimeError, match="it changed"):
                scaling.grow(chosen, optimizer, sample=data[0][0])
    else:
        message = "cannot be widened" if kind is Adafactor else "LBFGS lays out its state"
        with pytest.raises(TypeError, match=message):
            scaling.grow(chosen, optimizer, sample=data[0][0])
    assert everything(model, optimizer) == before
    assert torch.equal(model(data[0][0]), output)
    assert scaling.layers == layers
    scaling.grow(chosen, None, sample=data[0][0])  # nothing that was recorded is lost


def test_gradients_that_wait_for_a_step_stay() -> None:
    """Growth between backward passes that accumulate loses none of them."""
    model = small_deit()
    x, y = batches(model, 1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    old = {name: p.grad for name, p in model.named_parameters()}
    scaling = scaling_of(model, criterion="magnitude", depth=False, widen=("fc1",))
    scaling.grow(scaling.select(scaling.scores(), 200, 1), sample=x)
    for name, parameter in model.named_parameters():
        before, after = old[name], parameter.grad
        assert before is not None
        assert after is not None
        assert after.shape == parameter.shape
        assert torch.equal(after[tuple(map(slice, before.shape))], before)
        assert after.count_nonzero() == before.count_nonzero()


def test_a_model_that_others_changed_is_one_sentence() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 2))
    scaling = NeuronScaling(model, "magnitude")
    chosen = scaling.select(scaling.scores(), 20, 1)
    model[0] = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="layer '0', which has 1 now: the model was changed"):
        scaling.grow(chosen)


def test_starts_that_are_not_possible() -> None:
    model = small_deit()
    scaling = scaling_of(model, form="gated")
    record(scaling, batches(model, 1))
    chosen = scaling.select(scaling.scores(), 800, min_eligible=1)
    before = everything(model, None)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"init": "zeros"}, "Unknown init 'zeros'"),
        ({"scale": 0.0}, "scale is 0"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            scaling.grow(chosen, **options)
    with torch.no_grad():
        model.get_submodule(next(iter(chosen.neurons))).weight.zero_()  # type: ignore[operator]
    with pytest.raises(ValueError, match="has weights of 0, so a copy of it would never"):
        scaling.grow(chosen)
    with scaling.recording():
        F.cross_entropy(model(batches(model, 1)[0][0]), torch.zeros(5).long()).backward()
        with pytest.raises(RuntimeError, match="still open"):
            scaling.grow(chosen)
    assert everything(model, None) == before
    random = NeuronScaling(model, "random")
    picked = random.select(random.scores(), 800, min_eligible=1)
    with pytest.raises(ValueError, match="'random' has no eigenvectors to start from"):
        random.grow(picked, init="eigenvector")
    scaling.grow(chosen, init="eigenvector")


def test_torchs_encoder_evaluates_its_grown_layers() -> None:
    """Its fused kernel for evaluation would read the weights of linear1 and linear2 alone."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, "gelu", batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 4))
    scaling = NeuronScaling(model, "random", layers=["0.layers.1.*"])
    x = torch.randn(3, 5, 8)
    scaling.grow(scaling.select(scaling.scores(), 80, 1), sample=x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".branches." in name:
                parameter.normal_()
    model.eval()
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[0, 3:] = True
    for mask in (None, padded):
        with_gradients = model[0](x, src_key_padding_mask=mask)
        with torch.no_grad():
            without = model[0](x, src_key_padding_mask=mask)
        torch.testing.assert_close(without[:, :3], with_gradients[:, :3])


def test_growth_in_eval_mode_stays_there() -> None:
    model = small_deit().eval()
    scaling = NeuronScaling(model, "magnitude", form="pair")
    scaling.grow(scaling.select(scaling.scores(), 600, 1))
    assert not any(module.training for module in model.modules())
