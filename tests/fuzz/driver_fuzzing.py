"""Random calls of layers, solvers and growth drivers: right, or one clear error and no change.

    python tests/fuzz/driver_fuzzing.py --minutes 10
    python tests/fuzz/driver_fuzzing.py --calls 100000    # goes on where it was stopped

Right means: layers agree with float64 formulas, eigenpairs have the residuals that are promised,
growth keeps the function, conversions come back, records give the same network again. A call that
fails is appended to driver_corpus.jsonl, which `test_driver_corpus.py` replays; long runs are
counted in driver_record.json. The ops themselves have tests/ops/fuzzing.py.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "ops"))

import conversion_calls as conversions  # noqa: E402
import growth_calls as growths  # noqa: E402
import layer_calls as layers  # noqa: E402
import record_calls as records  # noqa: E402
import solver_calls as solvers  # noqa: E402
import state_calls as states  # noqa: E402
from fuzz_runs import Calls, Case, command  # noqa: E402
from random_networks import random_network  # noqa: E402
from refusals import RefusedError  # noqa: E402

# No call on networks this small takes as long, on any machine.
SECONDS = 60

Words = dict[str, Any]

# What is drawn, and what is done with it.
FAMILIES: dict[str, tuple[Callable[[random.Random], Words], Callable[[Words], None]]] = {
    "symmetric_eigs": (solvers.random_matrices, solvers.symmetric),
    "smallest_eigenpairs": (solvers.random_matrices, solvers.smallest),
    "splitting_eigs": (solvers.random_matrices, solvers.splitting),
    "BasisConv2d": (layers.random_layer, layers.basis_layer),
    "from_conv": (layers.random_layer, layers.basis_from_conv),
    "identity_layer": (layers.random_layer, layers.identity),
    "trained_layer": (layers.random_layer, layers.trained_layer),
    "Attention": (layers.random_layer, layers.attention),
    "convert": (conversions.random_plan, conversions.conversion),
    "separate_attention": (conversions.random_separation, conversions.separation),
    "BasisSearch": (conversions.random_search, conversions.search),
    "LayerInsertion": (growths.random_insertion, growths.insertion),
    "NeuronScaling": (growths.random_scaling, growths.scaling),
    "share_budget": (growths.random_scaling, records.shared),
    "rebuild": (records.random_tampering, records.tampered),
    "load_state_dict": (states.random_state, states.state),
    "describe": (random_network, records.described),
    "Monitor": (records.random_watching, records.watched),
}


def make_case(rng: random.Random) -> Case:
    family = rng.choice(list(FAMILIES))
    return {"family": family, **FAMILIES[family][0](rng)}


def check(case: Case) -> str:
    """ "right", or the one sentence with which something was refused."""
    began = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FAMILIES[case["family"]][1](case)
    except RefusedError as refused:
        return str(refused)
    finally:
        took = time.process_time() - began
        assert took < SECONDS, f"took {took:.0f} s"
    return "right"


CALLS = Calls(
    make_case, check, FOLDER / "driver_corpus.jsonl", FOLDER / "driver_record.json", of_a_seed=1000
)


if __name__ == "__main__":
    raise SystemExit(command(CALLS, __doc__))
