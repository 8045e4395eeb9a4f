"""Random exchanges of convolutions and attention, and the search for plans of them."""

from __future__ import annotations

import random
from typing import Any

import torch
from grown import States, check_after, dtype_of, holds_all, probe
from random_networks import (
    Words,
    batch_of,
    build,
    check_same_function,
    function_of,
    optimizer_of,
    random_network,
)
from refusals import Everything, one_call
from torch import nn

import growkernels as gk
from growkernels.growth import BasisSearch
from growkernels.growth.basis_search.taylor import Batches
from growkernels.nn import BasisConv2d

LAYERS = (nn.Conv2d, BasisConv2d)


def random_plan(rng: random.Random) -> Words:
    words = random_network(rng)
    if rng.random() < 0.9:
        while not words["images"]:
            words = random_network(rng)
    return {
        **words,
        "filters": [rng.choice((1, 1, 1, 1, 0.25, 0.5, 0.75, 1.0)) for _ in range(6)],
        "odd": rng.choice((*(None,) * 40, 0, -1, 1.5, True, "2", "nan", [1], "absent", "model")),
        "some": rng.random() < 0.5,
        "init": rng.choice((*("svd", "select") * 5, "random")),
        "record_only": rng.random() < 0.1,
        "sample": rng.random() < 0.5,
    }


def conversion(words: Words) -> None:
    """There, and back again."""
    model = build(words)
    optimizer = optimizer_of(model, words)
    held = holds_all(model, optimizer)
    sample = batch_of(words, 3) if words["sample"] else None
    plan = _plan(model, words)
    states = States(model, optimizer, words)
    before = Everything(model, optimizer)
    with one_call(model, optimizer):
        done = gk.nn.convert(
            model, plan, optimizer, words["init"], record_only=words["record_only"], sample=sample
        )
    assert str(done)
    assert set(done.converted) | set(done.skipped) == set(plan)
    if words["record_only"] or not done.converted:
        before.check_same(Everything(model, optimizer))
        return
    assert done.record == gk.growth.insertions(model)[-1]
    layers = dict(model.named_modules())
    for path, converted in done.converted.items():
        layer = layers[path]
        assert 0 <= converted.error <= 1.01 or converted.error != converted.error, converted
        weights = sum(p.numel() for n, p in layer.named_parameters() if n != "bias")
        assert weights == converted.weights
    states.check_grown(done.record, model, optimizer)
    assert holds_all(model, optimizer) == held
    there = function_of(model, probe(words))
    check_after(model, None, words, held)
    back = {p: layers[p].out_channels for p in done.converted if isinstance(layers[p], BasisConv2d)}
    with one_call(model, optimizer):
        gk.nn.convert(model, back, optimizer, sample=sample)
    assert not any(isinstance(model.get_submodule(path), BasisConv2d) for path in back)
    check_same_function(there, function_of(model, probe(words)), dtype_of(words))
    check_after(model, optimizer, words, holds_all(model, optimizer))


def _plan(model: nn.Module, words: Words) -> dict[str, Any]:
    paths = [path for path, module in model.named_modules() if isinstance(module, LAYERS)]
    if words["some"]:
        paths = paths[::2]
    plan: dict[str, Any] = dict(zip(paths, words["filters"] * 3, strict=False))
    odd = words["odd"]
    if odd == "absent":
        plan["nowhere.0"] = 1
    elif odd == "model":
        plan[""] = 1
    elif odd is not None and plan:
        plan[paths[-1]] = float("nan") if odd == "nan" else odd
    return plan


def random_separation(rng: random.Random) -> Words:
    words = random_network(rng)
    while not any(step[0] == "attention" for step in words["steps"]) and rng.random() < 0.9:
        words = random_network(rng)
    return {**words, "record_only": rng.random() < 0.1}


def separation(words: Words) -> None:
    model = build(words)
    optimizer = optimizer_of(model, words)
    held = holds_all(model, optimizer)
    before = function_of(model, probe(words))
    states = States(model, optimizer, words)
    with one_call(model, optimizer):
        done = gk.nn.separate_attention(model, optimizer, record_only=words["record_only"])
    if words["record_only"] or done.record is None:
        return
    check_same_function(before, function_of(model, probe(words)), dtype_of(words))
    states.check_grown(done.record, model, optimizer)
    check_after(model, optimizer, words, held)


def random_search(rng: random.Random) -> Words:
    return {
        **random_plan(rng),
        "fractions": rng.choice(
            (*([0.25, 0.5, 0.75], [0.5], [0.1, 0.9]) * 6, [], [0.0], [1.0], ["nan"])
        ),
        "layers": rng.choice((*(None,) * 9, ["absent"], [""])),
        "method": rng.choice((*("taylor", "taylor", "train") * 4, "guess")),
        "draws": rng.choice((*(1, 2) * 5, 0)),
        "rounds": rng.choice((*(1,) * 10, 0)),
        "timed": rng.random() < 0.3,
        "target": rng.choice((*("ratio", "max_cost") * 5, "both")),
        "number": rng.choice((*(0.9, 0.99, 0.5) * 3, 0.1, 0.0, 1.0, "nan")),
    }


def search(words: Words) -> None:
    """A plan, carried out."""
    model = build(words)
    sample = batch_of(words, 3)
    fractions = [float(fraction) for fraction in words["fractions"]]
    with one_call(model):
        found = BasisSearch(model, fractions, words["layers"], sample=sample)
    candidates = found.candidates
    again = BasisSearch(model, fractions, words["layers"], sample=sample)
    again.load_state_dict(found.state_dict())
    assert again.candidates == candidates
    how: dict[str, Any] = {"batches": _labelled(words), "draws": words["draws"]}
    if words["method"] == "train":
        how = {"train": lambda twin, generator: -float(sum(p.sum() for p in twin.parameters()))}
    with one_call(model):
        costs = found.sensitivities(words["method"], **how)
    assert {path: tuple(c) for path, c in costs.costs.items()} == candidates
    times = None
    with one_call(model):
        times = found.times(sample, words["rounds"]) if words["timed"] else None
    number = float(words["number"])
    target = {"ratio": number, "max_cost": number}
    if words["target"] != "both":
        target = {words["target"]: number}
    with one_call(model):
        plan = found.plan(costs, times, **target)
    assert all(rank in candidates[path] for path, rank in plan.items())
    with one_call(model):
        done = gk.nn.convert(model, plan)
    assert set(done.converted) == set(plan)
    check_after(model, None, words, True)


def _labelled(words: Words) -> Batches:
    """Batches with class indices."""
    generator = torch.Generator().manual_seed(words["seed"])
    shape = (words["batch"],)
    return [
        (batch_of(words, n), torch.randint(words["outputs"], shape, generator=generator))
        for n in range(2)
    ]
