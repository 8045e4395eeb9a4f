"""States of drivers that were tampered with: taken as they are, or refused and nothing changed."""

from __future__ import annotations

import copy
import random
from typing import Any

from grown import check_state, driven, record_batches
from growth_calls import random_recording
from random_networks import Words, batch_of, build
from record_calls import ODD, tamper
from refusals import RefusedError, one_call

import growkernels as gk


def random_state(rng: random.Random) -> Words:
    return {
        **random_recording(rng),
        "values": "normal",
        "inputs": "normal",
        "batch": 3,
        "batches": 1,
        "backwards": 1,
        "driver": rng.choice(("LayerInsertion", "NeuronScaling", "BasisSearch")),
        "at": rng.randrange(1 << 16),
        "do": rng.choice(("delete", "replace", "replace", "add")),
        "odd": rng.choice(ODD),
    }


def state(words: Words) -> None:
    model = build(words)
    with one_call(model):
        driver: Any = getattr(gk.growth, words["driver"])(model, sample=batch_of(words))
    if words["driver"] == "BasisSearch":
        _load(driver, words)
        return
    with driven(model, driver):
        with one_call():
            record_batches(driver, model, words)
        _load(driver, words)
        with one_call(model):
            driver.merits() if words["driver"] == "LayerInsertion" else driver.scores()


def _load(driver: Any, words: Words) -> None:
    before = driver.state_dict()
    holder = [copy.deepcopy(before)]
    tamper(holder, words)
    try:
        with one_call(driver.model):
            driver.load_state_dict(holder[0] if len(holder) == 1 else {})
    except RefusedError:
        check_state(driver.state_dict(), before, "the driver's state")
        raise
