"""Random growths of random networks by the two drivers: the function stays, or nothing changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from grown import States, check_after, driven, dtype_of, holds_all, probe, record_batches
from random_networks import (
    Words,
    batch_of,
    build,
    check_same_function,
    function_of,
    loss_of,
    optimizer_of,
    random_network,
)
from refusals import one_call
from torch import nn

import growkernels as gk
from growkernels.growth import LayerInsertion, NeuronScaling


def random_recording(rng: random.Random) -> Words:
    return {
        **random_network(rng),
        "batches": rng.choice((1, 1, 1, 2, 3, 0)),
        "backwards": rng.choice((*(1,) * 12, 0, 2)),
        "rounds": rng.choice((1, 1, 2)),
        "sample": rng.random() < 0.5,
        "checked": rng.random() < 0.5,
        "where": rng.randrange(100),
    }


def random_insertion(rng: random.Random) -> Words:
    common = rng.random() < 0.8
    return {
        **random_recording(rng),
        "norm": "frobenius" if common else rng.choice(("frobenius_scaled", "operator", "nuclear")),
        "kinds": None
        if common
        else rng.choice((["residual"], ["linear_relu", "conv2d_relu"], ["block"], ["attention"])),
        "named": not common and rng.random() < 0.5,
        "activation": None if common else rng.choice(("tanh", "relu", "gelu", "softplus")),
        "scale": 0.8 if common else rng.choice((0.0, 1.0, -2.0)),
        "init": rng.choice(("copy", "copy", "fresh")),
        "rule": rng.choice((*("max", "relative") * 8, "min")),
        "tau": rng.choice((0.0, 1.0, 1e9)),
        "selected": rng.random() < 0.5,
    }


def insertion(words: Words) -> None:
    _in_rounds(words, _insert_once)


def _in_rounds(words: Words, once: Callable[[nn.Module, Any, Words], None]) -> None:
    model = build(words)
    optimizer = optimizer_of(model, words)
    for _ in range(words["rounds"]):
        once(model, optimizer, words)
        check_after(model, optimizer, words, holds_all(model, optimizer))


def _named(model: nn.Module, words: Words) -> list[str] | None:
    if not words["named"]:
        return None
    paths = [path for path, _ in model.named_modules() if path] + ["absent"]
    return [paths[words["where"] % len(paths)]]


def _insert_once(model: nn.Module, optimizer: Any, words: Words) -> None:
    sample = batch_of(words, 3)
    held = holds_all(model, optimizer)
    with one_call(model, optimizer):
        driver = LayerInsertion(
            model,
            _named(model, words),
            norm=words["norm"],
            kinds=words["kinds"],
            activation=words["activation"],
            scale=words["scale"],
            sample=sample if words["sample"] else None,
            init=words["init"],
        )
    with driven(model, driver):
        with one_call():
            record_batches(driver, model, words)
        with one_call(model, optimizer):
            merits = driver.merits()
            selected = driver.select(merits, words["rule"], words["tau"])
        places = [position.name for position in driver.positions]
        chosen = selected if words["selected"] else places[words["where"] % len(places)]
        state = driver.state_dict()
        driver.load_state_dict(state)
        states = States(model, optimizer, words)
        with one_call(model, optimizer):
            record = driver.record(chosen)  # type: ignore[arg-type]
        with one_call(model, optimizer):
            driver.insert(chosen, optimizer, sample if words["checked"] else None)  # type: ignore[arg-type]
        assert driver.positions
    assert gk.growth.insertions(model)[-1] == record
    assert holds_all(model, optimizer) == held
    after = function_of(model, probe(words))
    # That a block is the identity is seen on the sample, which may tell nothing, as zeros do.
    if record["kind"] != "block" or words["inputs"] == "normal":
        check_same_function(states.function(), after, dtype_of(words))
    states.check_grown(record, model, optimizer)


def _widened(rng: random.Random, network: Words) -> list[str]:
    """Roles that layers of the network may have; at times others."""
    if rng.random() < 0.05:
        return rng.choice((["fc1"], ["conv"], ["v", "qk"], ["gated"]))
    roles = {"conv": "conv", "block": "conv", "linear": "fc1", "mlp": "fc1", "gated": "gated"}
    found = {roles[step[0]] for step in network["steps"] if step[0] in roles}
    if any(step[0] == "attention" and not step[3] for step in network["steps"]):
        found |= {"v", "qk"}
    return sorted(role for role in found if rng.random() < 0.6)


def random_scaling(rng: random.Random) -> Words:
    recorded = random_recording(rng)
    criterion = rng.choice(
        ("splitting", "splitting", "s2d", "gradient_sum", "gradmax", "tiny", "magnitude", "random")
    )
    widen = _widened(rng, recorded)
    closed = criterion in ("gradmax", "tiny") and rng.random() < 0.95
    if closed:
        widen = ["conv" if recorded["images"] else "fc1"]
    usual = criterion if closed else rng.choice(("parent", "parent", "eigenvector"))
    return {
        **recorded,
        "sample": recorded["sample"] or bool({"conv", "gated"} & set(widen)),
        "criterion": criterion,
        "layers": rng.choice((*(None,) * 20, ["*"], ["0"], ["absent"], ["blocks.*"])),
        "kinds": rng.choice((*(["linear", "conv2d"],) * 6, ["linear"], ["conv2d"])),
        "form": rng.choice(("single", "pair", "gated")),
        "depth": not (closed or (widen and rng.random() < 0.5)),
        "widen": widen,
        "rows": rng.choice((*(4096, 3, 1) * 10, 0)),
        "relu_beta": rng.choice((None, *(3.0,) * 20, 0.0)),
        "budget": rng.choice((*(50, 200, 1000) * 8, 0, -1, "nan", "inf")),
        "min_eligible": rng.choice((*(1,) * 20, 0, 2, 60)),
        "unit": rng.choice(("parameters",) * 20 + ("flops", "seconds", "steps")),
        "round_to": rng.choice((*(None,) * 20, 2, 4, 0)),
        "init": usual
        if rng.random() < 0.95
        else rng.choice(("parent", "eigenvector", "gradmax", "tiny", "zeros")),
        "scale": rng.choice((*(0.2, 0.2, 1.0) * 8, 0.0, -1.0, "nan", 1e30)),
        "loss": (criterion == "tiny" and rng.random() < 0.3) or rng.random() < 0.02,
    }


def scaling(words: Words) -> None:
    _in_rounds(words, _grow_once)


def _grow_once(model: nn.Module, optimizer: Any, words: Words) -> None:
    sample = batch_of(words, 3)
    held = holds_all(model, optimizer)
    with one_call(model, optimizer):
        driver = NeuronScaling(
            model,
            words["criterion"],
            layers=words["layers"],
            kinds=words["kinds"],
            form=words["form"],
            depth=words["depth"],
            widen=words["widen"],
            rows=words["rows"],
            relu_beta=words["relu_beta"],
            sample=sample if words["sample"] else None,
            generator=torch.Generator().manual_seed(words["seed"]),
        )
    with driven(model, driver):
        assert driver.layers
        assert set(driver.categories) == set(driver.layers)
        with one_call():
            record_batches(driver, model, words)
        with one_call(model, optimizer):
            scores = driver.scores()
        assert str(scores)
        for layer, values in scores.values.items():
            assert bool(values.isfinite().all()), (layer, values)
        driver.load_state_dict(driver.state_dict())
        with one_call(model, optimizer):
            chosen = driver.select(
                scores,
                float(words["budget"]),
                words["min_eligible"],
                unit=words["unit"],
                sample=sample,
                round_to=words["round_to"],
            )
        assert str(chosen)
        if words["unit"] == "parameters":
            assert not chosen or chosen.parameters <= float(words["budget"]), chosen
        how = {"init": words["init"], "scale": float(words["scale"])}
        states = States(model, optimizer, words)
        with one_call(model, optimizer):
            record = driver.record(chosen, optimizer, **how)
        count = sum(p.numel() for p in model.parameters())
        checked = sample if words["checked"] and words["init"] != "tiny" else None
        loss = (lambda twin: float(loss_of(twin, sample).detach())) if words["loss"] else None
        with one_call(model, optimizer):
            driver.grow(chosen, optimizer, sample=checked, loss=loss, **how)
    grown = sum(p.numel() for p in model.parameters()) - count
    assert grown == chosen.parameters, f"{grown} new parameters, not {chosen.parameters}"
    assert holds_all(model, optimizer) == held
    if words["init"] != "tiny":
        check_same_function(states.function(), function_of(model, probe(words)), dtype_of(words))
    if loss is None:
        states.check_grown(record, model, optimizer)
