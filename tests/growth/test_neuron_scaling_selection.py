"""Which layers are candidates, and which neurons a budget buys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scaling_networks import (
    TimmBlock,
    TokenClassifier,
    TorchvisionBlock,
    batches,
    grow_once,
    parameters,
    small_cnn,
    small_deit,
)
from torch import Tensor, nn
from training import record

from growkernels.growth import NeuronScaling
from growkernels.growth.neuron_scaling import Scores, Selection, forward_flops
from growkernels.models.deit import DeiT
from growkernels.nn import Attention
from growkernels.nn.grown_layers import Branch


def layer_at(model: nn.Module, path: str) -> nn.Linear | nn.Conv2d:
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer


def random_scores(scaling: NeuronScaling, seed: int = 0) -> Scores:
    """Scores of which a good half is eligible."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for layer in scaling.layers:
        n = len(layer_at(scaling.model, layer).weight)
        values[layer] = torch.rand(n, generator=generator, dtype=torch.float64) - 0.6
    return Scores("splitting", values)


def choose(scaling: NeuronScaling, budget: int, min_eligible: int = 1) -> Selection:
    return scaling.select(random_scores(scaling), budget, min_eligible)


def test_layers_of_timms_transformer_are_found_and_can_be_grown() -> None:
    model = TokenClassifier(TimmBlock)
    scaling = NeuronScaling(model, widen=("fc1",))
    assert scaling.categories == {
        f"blocks.{block}.{layer}": layer.split(".")[1] if layer != "attn.qkv" else "qkv"
        for block in (0, 1)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert "logits" in scaling.left_out["head"]
    before = parameters(model)
    assert grow_once(scaling, 1000) == parameters(model) - before > 900
    assert grow_once(scaling, 1000) > 900


def test_layers_of_torchvisions_transformer_are_found() -> None:
    model = TokenClassifier(TorchvisionBlock)
    scaling = NeuronScaling(model, widen=("fc1",))
    assert set(scaling.categories.values()) == {"mlp"}
    assert len(scaling.layers) == 4
    assert "not known" in scaling.left_out["blocks.0.self_attention.out_proj"]
    before = parameters(model)
    assert grow_once(scaling, 500) == parameters(model) - before > 400


def test_layers_can_be_named() -> None:
    model = small_deit()
    assert NeuronScaling(model, layers=["head", "*.1.attn.v"]).layers == ("blocks.1.attn.v", "head")
    with pytest.raises(ValueError, match=r"No layer that can be grown matches 'blocks\.7\.\*'"):
        NeuronScaling(model, layers=["blocks.7.*"])
    with pytest.raises(ValueError, match=r"matches 'patch_embed.proj': layers of kind 'conv2d'"):
        NeuronScaling(model, layers=["patch_embed.proj"])
    with pytest.raises(TypeError, match="give a list of paths"):
        NeuronScaling(model, layers="blocks.*")
    odd = nn.Sequential(
        nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same"), nn.Conv2d(2, 2, 1)
    )
    scaling = NeuronScaling(odd, kinds=("conv2d",))
    assert scaling.layers == ("2",)
    assert "groups" in scaling.left_out["0"]
    assert "padding" in scaling.left_out["1"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"criterion": "hessian"},
            ValueError,
            "Unknown criterion 'hessian'; choose from splitting",
        ),
        ({"form": "triple"}, ValueError, "Unknown form 'triple'"),
        ({"kinds": ("conv3d",)}, ValueError, "Unknown kinds 'conv3d'"),
        ({"kinds": "linear"}, TypeError, "give a list of names"),
        ({"widen": ("fc3",)}, ValueError, "Unknown widen 'fc3'"),
        ({"depth": False}, ValueError, "name what to widen"),
        ({"rows": 0}, ValueError, "rows is 0"),
        ({"relu_beta": 0.0}, ValueError, "relu_beta is 0"),
        ({"layers": ["*.proj"], "widen": ("v",)}, ValueError, "No layer can be widened as 'v'"),
        ({"layers": ["*.q"], "criterion": "s2d"}, ValueError, "every 's2d' matrix is zero"),
    ],
)
def test_wishes_that_cannot_be_met(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NeuronScaling(small_deit(), **options)


def test_models_that_cannot_be_grown() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"'0' shares a parameter \('0.weight' is '2.weight'\)"):
        NeuronScaling(tied)
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="'0' shares a parameter"):
        NeuronScaling(nn.Sequential(layer, layer, nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="has no layer to grow"):
        NeuronScaling(nn.Sequential(nn.Bilinear(3, 3, 3)))
    with pytest.raises(ValueError, match="has no layer to grow"):
        NeuronScaling(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"wrapped in DataParallel: pass model\.module"):
        NeuronScaling(nn.DataParallel(small_deit()))
    overwriting = nn.Sequential(nn.Linear(3, 3), nn.SiLU(inplace=True), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Activation '1' overwrites its input"):
        NeuronScaling(overwriting, "s2d")


class TwoWays(nn.Module):
    """A module whose own parts are called branches, of different widths."""

    def __init__(self) -> None:
        super().__init__()
        narrow = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4))
        self.branches = nn.ModuleList([nn.Linear(3, 4), narrow])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branches[0](x) + self.branches[1](x)
        return out


def test_branches_of_the_models_own_are_layers_like_others() -> None:
    model = nn.Sequential(TwoWays(), nn.Linear(4, 4)).double()
    names = ("0.branches.0", "0.branches.1.0", "0.branches.1.2")
    assert NeuronScaling(model, layers=["0.branches.1.*"]).layers == names[1:]
    scaling = NeuronScaling(model, "magnitude", form="pair")
    assert scaling.layers == names
    for _ in range(2):
        before = parameters(model)
        chosen = choose(scaling, 150)
        scaling.grow(chosen, sample=torch.randn(2, 3, dtype=torch.float64))
        assert parameters(model) - before == chosen.parameters <= 150


class GatedMlp(nn.Module):
    """Half of fc1's outputs gate the others, as in timm's GluMlp."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(3, 8), nn.GELU(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        out: Tensor = self.fc2(self.act(gate) * value)
        return out


class NormedMlp(nn.Module):
    """The activation takes what a norm makes of fc1's outputs, as in timm's ConvMlp."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.act, self.fc2 = (
            nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4)
        )  # fmt: skip


@pytest.mark.parametrize("mlp", [GatedMlp, NormedMlp])
def test_an_activation_behind_something_else_is_not_the_layers_own(mlp: type[nn.Module]) -> None:
    model = nn.Sequential(mlp(), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="every 's2d' matrix is zero"):
        NeuronScaling(model, "s2d")
    with pytest.raises(ValueError, match="No layer can be widened as 'fc1'"):
        NeuronScaling(model, widen=("fc1",))


def test_widening_needs_weights_that_are_the_layers_own() -> None:
    """The weights of both the widened layer and the one behind it are exchanged."""

    def mlp() -> nn.Sequential:
        last = nn.Sequential(nn.Softmax(-1), nn.Linear(3, 3))
        return nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 3), *last)

    for place in (0, 2):
        model = mlp()
        torch.nn.utils.spectral_norm(model[place])
        assert len(NeuronScaling(model).layers) == 2
        with pytest.raises(ValueError, match="No layer can be widened as 'fc1'"):
            NeuronScaling(model, widen=("fc1",))
    tied = mlp()
    tied[4].weight = tied[2].weight
    assert NeuronScaling(tied, layers=["0"]).layers == ("0",)
    with pytest.raises(ValueError, match=r"'2' shares a parameter \('2.weight' is '4.weight'\)"):
        NeuronScaling(tied, layers=["0"], widen=("fc1",))


def flops_of_one_image(model: DeiT) -> int:
    """By the sizes of the layers: matrix products and the patch convolution, grown layers too."""
    tokens = model.pos_embed.shape[1]
    patches = (tokens - 1) * model.patch_embed.proj.weight.numel()
    linear = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear))
    shared = sum(  # a pair's two layers are one product
        m.minus.weight.numel()
        for m in model.blocks.modules()
        if isinstance(m, Branch) and m.form == "pair" and m.is_bare
    )
    attention = sum(
        m.q.out_features + m.v.out_features
        for m in model.blocks.modules()
        if isinstance(m, Attention)
    )
    in_tokens = tokens * (linear - shared) + tokens**2 * attention
    return 2 * (patches + in_tokens + model.head.weight.numel())


@pytest.mark.parametrize("form", ["pair", "single", "gated"])
@pytest.mark.parametrize("widen", [(), ("fc1",), ("fc1", "v", "qk")])
@pytest.mark.parametrize("depth", [True, False])
def test_the_cost_is_the_number_of_new_parameters(
    form: str, widen: tuple[str, ...], depth: bool
) -> None:
    """Exactly, over three steps that build on one another, and never above the budget."""
    if not depth and not widen:
        return
    model = small_deit()
    scaling = NeuronScaling(model, "magnitude", form=form, widen=widen, depth=depth)
    for budget in (200, 250, 90):
        before = parameters(model)
        chosen = choose(scaling, budget)
        scaling.grow(chosen, init="parent")
        assert parameters(model) - before == chosen.parameters <= budget
        assert chosen.parameters > 0
        sample = batches(model, 1)[0][0]
        assert forward_flops(model, sample) == 5 * flops_of_one_image(model)


def test_the_cost_is_exact_in_chains_and_convolutions() -> None:
    """Every linear of a chain is the follower of one and followed by the next."""
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False)
    )
    convolutions = small_cnn()
    for model, options in ((chain, {"widen": ("fc1",)}), (convolutions, {"kinds": ("conv2d",)})):
        scaling = NeuronScaling(model, "magnitude", form="pair", **options)  # type: ignore[arg-type]
        for _ in range(2):
            before = parameters(model)
            chosen = choose(scaling, 400)
            scaling.grow(chosen)
            assert parameters(model) - before == chosen.parameters > 100


def test_each_category_spends_its_share_on_its_lowest_scores() -> None:
    model = small_deit()
    scaling = NeuronScaling(model, "magnitude", form="single")
    chosen = choose(scaling, 400)
    scores = chosen.scores.values
    spent: dict[str, int] = {}
    for layer, neurons in chosen.neurons.items():
        inputs = layer_at(model, layer).weight.shape[1]
        category = scaling.categories[layer]
        spent[category] = spent.get(category, 0) + len(neurons) * (inputs + 1)
    assert sum(spent.values()) == chosen.parameters <= 400
    assert set(spent) == {"qkv", "proj", "fc1", "fc2"}
    assert min(spent.values()) > 100 - 13
    for category in spent:
        layers = [layer for layer in scaling.layers if scaling.categories[layer] == category]
        taken = [scores[layer][list(chosen.neurons.get(layer, ()))] for layer in layers]
        left = torch.cat(
            [
                value
                for layer in layers
                for number, value in enumerate(scores[layer].split(1))
                if number not in chosen.neurons.get(layer, ())
            ]
        )
        if category in ("qkv", "fc1"):  # one price per neuron: strictly in order of the scores
            assert float(torch.cat(taken).max()) <= float(left.min())
    assert "400 parameters, the lowest by 'splitting'" in chosen.reason


def test_what_one_category_cannot_spend_goes_to_the_others() -> None:
    scaling = NeuronScaling(small_deit(), "magnitude")
    scores = random_scores(scaling)
    for layer in scaling.layers:
        if not layer.endswith("fc1"):
            scores.values[layer][1:] = 1.0  # one eligible neuron each
    chosen = scaling.select(scores, 200, min_eligible=1)
    assert 200 - 13 < chosen.parameters <= 200
    assert len(chosen.neurons["blocks.0.mlp.fc1"]) * 13 > 200 / 4
    chosen = scaling.select(scores, 10**6, min_eligible=1)
    assert sum(map(len, chosen.neurons.values())) == sum(
        int((v < 0).sum()) for v in scores.values.values()
    )


def test_layers_with_few_eligible_neurons_stay_as_they_are() -> None:
    scaling = NeuronScaling(small_deit(), "magnitude")
    scores = random_scores(scaling)
    enough = {layer for layer, v in scores.values.items() if int((v < 0).sum()) >= 5}
    assert 0 < len(enough) < len(scaling.layers)
    assert set(scaling.select(scores, 10**6, min_eligible=5).neurons) == enough
    none = scaling.select(scores, 10**6, min_eligible=60)
    assert not none
    assert "No layer has 60 eligible neurons" in none.reason
    with pytest.raises(ValueError, match=r"no neurons to grow\. No layer has 60"):
        scaling.grow(none)


def test_widened_heads_get_the_same_number_each() -> None:
    scaling = NeuronScaling(
        small_deit(), "magnitude", depth=False, widen=("v", "qk"), layers=["blocks.0.attn.*"]
    )
    scores = random_scores(scaling)
    scores.values["blocks.0.attn.v"] = Tensor([-9, -8, -1, 5, -2, -3]).double()
    scores.values["blocks.0.attn.q"] = Tensor([-9, -8, 1, 5, -2, -3]).double()
    chosen = scaling.select(scores, 10**6, min_eligible=1)
    assert chosen.neurons["blocks.0.attn.v"] == (0, 2, 5)  # the best of each head
    assert "blocks.0.attn.q" not in chosen.neurons  # its second head has none
    scores = Scores("magnitude", dict.fromkeys(scores.values, scores.values["blocks.0.attn.q"]))
    chosen = scaling.select(scores, 10**6, min_eligible=4)
    assert not chosen
    assert "has 4 eligible neurons (score below 0), but none in one of its heads" in chosen.reason


def test_scores_and_selection_print_a_line_per_layer() -> None:
    scaling = NeuronScaling(small_deit())
    scores = random_scores(scaling)
    chosen = scaling.select(scores, 400, min_eligible=1)
    lines = str(scores).splitlines()
    assert len(lines) == 1 + len(scaling.layers)
    eligible = int((scores.values[scaling.layers[0]] < 0).sum())
    assert lines[1].startswith(f"{scaling.layers[0]}: {eligible} of ")
    *layers, last = str(chosen).splitlines()
    assert [line.split(":")[0] for line in layers] == list(chosen.neurons)
    assert last == f"{chosen.parameters} parameters. {chosen.reason}"


def test_budgets_and_scores_that_do_not_fit() -> None:
    model = small_deit()
    scaling = NeuronScaling(model, "magnitude", form="pair")
    scores = random_scores(scaling)
    with pytest.raises(
        ValueError, match=r"budget of 13 parameters is too small for one neuron: .* adds 14"
    ):
        scaling.select(scores, 13, min_eligible=1)  # proj has 6 inputs
    heads = NeuronScaling(model, "magnitude", widen=("v",), layers=["blocks.0.attn.v"])
    with pytest.raises(ValueError, match="budget of nan parameters is too small for"):
        scaling.select(scores, float("nan"), min_eligible=1)
    with pytest.raises(ValueError, match="too small for one neuron in each head"):
        heads.select(Scores("random", {"blocks.0.attn.v": -torch.ones(6)}), 113, min_eligible=1)
    with pytest.raises(ValueError, match="scores are of other layers"):
        heads.select(scores, 1000)
    chosen = scaling.select(scores, 500, min_eligible=1)
    with pytest.raises(ValueError, match="no candidate now"):
        heads.grow(chosen)
    record_of = NeuronScaling(model)
    record(record_of, batches(model, 1))
    assert record_of.select(record_of.scores(), 500, min_eligible=1)
