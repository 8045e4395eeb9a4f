"""Records that were tampered with, and what is told of a network before it grows."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from grown import holds_all, probe, rebuilt
from random_networks import (
    Words,
    batch_of,
    build,
    function_of,
    loss_of,
    optimizer_of,
    random_network,
)
from refusals import Everything, RefusedError, one_call
from torch import nn

import growkernels as gk
from growkernels.growth import (
    FixedStep,
    Interval,
    LayerInsertion,
    LossPlateau,
    MeritRatio,
    Monitor,
    NeuronScaling,
    WarmUp,
)
from growkernels.nn import BasisConv2d

# Numbers that memory cannot be asked for by accident, but for one that no memory has.
ODD = (None, True, -1, 0, 1, 2, 3, 1.5, 1e30, "nan", 10**18, "", "x", "0", "1.0", [], [0], [[]], {})


def random_tampering(rng: random.Random) -> Words:
    words = random_network(rng)
    return {
        **words,
        "values": "normal",
        "inputs": "normal",
        "batch": 3,
        "form": rng.choice(("single", "pair", "gated")),
        "first": rng.choice(("insert", "convert", "grow")),
        "at": rng.randrange(1 << 16),
        "do": rng.choice(("delete", "replace", "replace", "replace", "repeat", "add")),
        "odd": rng.choice(ODD),
        "text": rng.choice(("no", "no", "json", "cut")),
        "with_states": rng.random() < 0.5,
    }


def tampered(words: Words) -> None:
    """Another network, or a sentence and nothing changed."""
    model = build(words)
    _grow(model, words)
    records: Any = gk.growth.insertions(model)
    if not records:
        return
    tamper(records, words)
    if words["text"] != "no":
        records = json.dumps(records)
        if words["text"] == "cut":
            records = records[: words["at"] % len(records)]
    fresh = build(words)
    optimizer = optimizer_of(fresh, {**words, "seed": 0})
    held = holds_all(fresh, optimizer)
    with one_call(fresh, optimizer):
        gk.growth.rebuild(fresh, records, optimizer)
    assert holds_all(fresh, optimizer) == held
    if words["with_states"]:
        state = build(words).state_dict()
        with one_call():
            gk.growth.grow_state(records, state, build=lambda: build(words))


def _grow(model: nn.Module, words: Words) -> None:
    """Whatever the network can, beginning with what the words say."""
    todo = ["insert", "convert", "grow"]
    for what in sorted(todo, key=lambda name: name != words["first"]):
        try:
            with one_call():
                if what == "convert":
                    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Conv2d)]
                    gk.nn.convert(model, dict.fromkeys(paths, 1))
                elif what == "insert":
                    inserter = LayerInsertion(model)
                    with inserter.recording():
                        loss_of(model, batch_of(words)).backward()
                    inserter.insert(inserter.positions[0].name)
                    inserter.close()
                else:
                    kinds = ("linear", "conv2d")
                    scaling = NeuronScaling(model, "magnitude", kinds=kinds, form=words["form"])
                    scaling.grow(scaling.select(scaling.scores(), 100, 1))
                    scaling.close()
        except RefusedError:
            continue


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in list(items):
        yield value, key
        if isinstance(part, dict | list):
            yield from _places(part)


def tamper(records: list[Any], words: Words) -> None:
    places = list(_places(records))
    container, key = places[words["at"] % len(places)]
    odd = float("nan") if words["odd"] == "nan" else words["odd"]
    if words["do"] == "delete":
        del container[key]
    elif words["do"] == "replace":
        container[key] = odd
    elif words["do"] == "repeat":
        records.append(records[words["at"] % len(records)])
    elif isinstance(container, list):
        container.append(odd)
    else:
        container["more"] = odd


def described(words: Words) -> None:
    """What is said to be possible is, and the model stays as it is."""
    model = build(words)
    sample = batch_of(words)
    before = Everything(model, None)
    with one_call(model):
        said = gk.growth.describe(model, sample)
    before.check_same(Everything(model, None))
    assert str(said)
    inserted, based = said.possible("insert"), said.possible("basis")
    if inserted:
        driver = LayerInsertion(model, sample=sample, activation="tanh")
        assert {p.name for p in driver.positions} == set(inserted), inserted
        driver.close()
    if said.possible("grow"):
        layers = list(said.possible("grow"))
        driver = NeuronScaling(model, layers=layers, kinds=("linear", "conv2d"))  # type: ignore[assignment]
        assert set(driver.layers) == set(layers)  # type: ignore[attr-defined]
        driver.close()
    for path in based if words["values"] not in ("nan", "inf", "huge") else ():
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Conv2d | BasisConv2d)
        gk.nn.convert(model, {path: 1}, record_only=True)
    before.check_same(Everything(model, None))


def random_watching(rng: random.Random) -> Words:
    return {
        **random_network(rng),
        "steps_of": [rng.choice((*(1, 2, 3) * 9, 0, -1)) for _ in range(4)],
        "numbers": [rng.choice((*(0.25, 0.5, 0.75) * 9, 0.0, 1.0, -1.0, "nan")) for _ in range(6)],
    }


def watched(words: Words) -> None:
    """Monitors, warm-ups and triggers around training steps and a growth."""
    model = build(words)
    optimizer = optimizer_of(model, words)
    numbers = [float(number) for number in words["numbers"]]
    steps = words["steps_of"]
    with one_call(model, optimizer):
        monitor = Monitor(model, optimizer, steps[0])
    with one_call(model, optimizer):
        warm_up = WarmUp(model, optimizer, steps[1])
    _grow(model, {**words, "first": "grow", "form": "gated"})
    if words["batch"] > 1 and words["optimizer"] not in ("LBFGS", "Adafactor", "two", "none"):
        for number in range(3):
            loss_of(model, batch_of(words, number)).backward()
            optimizer.step()
        assert monitor.steps == 3
        assert len(monitor.history) == len(range(0, 3, steps[0]))
    monitor.close()
    warm_up.close()
    with one_call():
        triggers = [
            FixedStep(steps), Interval(steps[2], steps[3]), LossPlateau(steps[2], numbers[0]),
            MeritRatio(numbers[1], steps[3]),
        ]  # fmt: skip
    for trigger in triggers:
        with one_call():
            for step, loss in enumerate(numbers):
                due = trigger.due(step, loss)
                assert due in (True, False)
        trigger.load_state_dict(trigger.state_dict())


def shared(words: Words) -> None:
    """One budget for branches and wider layers."""
    model = build(words)
    with one_call(model):
        drivers = [
            NeuronScaling(model),
            NeuronScaling(model, "gradmax", widen=("fc1",), depth=False),
        ]
    for driver in drivers:
        with one_call(), driver.recording():
            loss_of(model, batch_of(words)).backward()
    with one_call(model):
        asked = [(driver, driver.scores()) for driver in drivers]
    with one_call(model):
        chosen = gk.growth.share_budget(asked, float(words["budget"]), step=float(words["scale"]))
    parameters = sum(each.parameters for each in chosen)
    assert not any(chosen) or parameters <= float(words["budget"]), chosen
    before = function_of(build(words), probe(words))
    with one_call(model):
        for driver, choice, init in zip(drivers, chosen, ("parent", "gradmax"), strict=True):
            if choice:
                driver.grow(choice, init=init)
    for driver in drivers:
        driver.close()
    assert rebuilt(words, gk.growth.insertions(model)) is not None
    assert before[0].shape == function_of(model, probe(words))[0].shape
