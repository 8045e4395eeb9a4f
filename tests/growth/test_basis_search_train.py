"""Short trainings: what each starts from, what is compared, and how a killed search goes on."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growkernels.growth.basis_search import BasisSearch, Sensitivities
from growkernels.nn import BasisConv2d

ONE = {"fractions": (0.25, 0.5), "layers": ["1"]}


def small_net(generator: torch.Generator | None = None) -> nn.Sequential:
    if generator is None:
        generator = torch.Generator().manual_seed(11)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=generator)
    return model


def train_briefly(model: nn.Module, generator: torch.Generator) -> float:
    """Two steps of regression; minus the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        x = torch.randn(4, 2, 6, 6, generator=generator)
        loss = F.mse_loss(model(x), x.mean((2, 3)).repeat(1, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return -float(loss.detach())


class Recording:
    """`train_briefly` that keeps what it was given; raises at a call if asked to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.first_weights: list[Tensor] = []
        self.kinds: list[type[nn.Module]] = []
        self.generators: list[Tensor] = []

    def __call__(self, model: nn.Module, generator: torch.Generator) -> float:
        if len(self.kinds) == self.fail_at:
            raise KeyboardInterrupt
        self.first_weights.append(model.get_parameter("0.weight").detach().clone())
        self.kinds.append(type(model.get_submodule("1")))
        self.generators.append(generator.get_state())
        return train_briefly(model, generator)


def searched(train: object = train_briefly, **options: object) -> Sensitivities:
    return BasisSearch(small_net(), **ONE).sensitivities(
        "train", **{"train": train, "seeds": (0, 1, 2), **options}
    )


def test_costs_are_paired_differences_of_quality() -> None:
    found = searched()
    qualities: dict[int, list[float]] = {0: [], 2: [], 4: []}
    for rank, values in qualities.items():
        for seed in range(3):
            model = small_net()
            if rank:
                conv = model[1]
                assert isinstance(conv, nn.Conv2d)
                model[1] = BasisConv2d.from_conv(conv, rank)
            values.append(train_briefly(model, torch.Generator().manual_seed(seed)))
    full = torch.tensor(qualities.pop(0)).double()
    assert found.method == "train"
    assert found.baseline == pytest.approx(float(full.mean()))
    assert list(found.costs) == ["1"]
    for rank, values in qualities.items():
        lost = full - torch.tensor(values).double()
        assert found.costs["1"][rank] == pytest.approx(float(lost.mean()), rel=1e-5)
        assert found.errors["1"][rank] == pytest.approx(float(lost.std()) / 3**0.5, rel=1e-4)
    assert found.seconds > 0


def test_all_trainings_of_a_seed_start_the_same() -> None:
    train = Recording()
    model = small_net()
    BasisSearch(model, **ONE).sensitivities("train", train=train, seeds=(5, 6))
    assert train.kinds == [nn.Conv2d] * 2 + [BasisConv2d] * 4
    assert all(torch.equal(w, model[0].weight) for w in train.first_weights)
    order = [5, 6, 5, 6, 5, 6]
    for seed, state in zip(order, train.generators, strict=True):
        assert torch.equal(state, torch.Generator().manual_seed(seed).get_state())


def test_build_draws_the_first_weights_from_the_seed() -> None:
    train = Recording()
    search = BasisSearch(small_net(), **ONE)
    search.sensitivities("train", train=train, seeds=(5, 6), build=small_net)
    five, six = (small_net(torch.Generator().manual_seed(s))[0].weight for s in (5, 6))
    for expected, weight in zip([five, six] * 3, train.first_weights, strict=True):
        assert torch.equal(expected, weight)


def test_threads_in_any_order_give_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = searched(map_trials=lambda f, trials: pool.map(f, reversed(list(trials))))
    expected = searched()
    assert found.costs == expected.costs
    assert found.errors == expected.errors


def test_progress_counts_what_is_stored(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    options = {"results": tmp_path / "r.jsonl", "progress": lambda *at: seen.append(at)}
    searched(**options)
    assert seen == [(n, 9) for n in range(10)]
    seen.clear()
    searched(**options)
    assert seen == [(9, 9)]


def test_stopped_search_goes_on_with_the_same_result(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "results.jsonl"
    with pytest.raises(KeyboardInterrupt):
        searched(Recording(fail_at=4), results=file)
    with file.open("ab") as end:
        end.write(b'["1", 2, 0, -0.')  # what a kill in the middle of a line leaves
    rest = Recording()
    found = searched(rest, results=str(file))
    assert len(rest.kinds) == 9 - 4
    expected = searched()
    assert found.costs == expected.costs
    assert found.errors == expected.errors
    more = Recording()
    searched(more, results=file, seeds=(0, 1, 2, 3))
    assert len(more.kinds) == 3, "results of the first three seeds hold"


SEARCH_THAT_STANDS_STILL = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_basis_search_train import searched, train_briefly

results = Path(sys.argv[1])

def train(model, generator):
    if results.exists() and results.read_bytes().count(b"\\n") >= 3:
        time.sleep(600)  # until it is killed
    return train_briefly(model, generator)

searched(train, results=results)
"""


def test_killed_search_goes_on_with_the_same_result(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    here = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", SEARCH_THAT_STANDS_STILL, str(file), here])
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.005)
    with pytest.raises(ValueError, match=r"is in use by another search"):
        searched(results=file)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert searched(results=file).costs == searched().costs


def test_divergence_is_an_infinite_cost(tmp_path: Path) -> None:
    def train(model: nn.Module, generator: torch.Generator) -> float:
        conv = model.get_submodule("1")
        diverges = isinstance(conv, BasisConv2d) and conv.basis_channels == 2
        return math.nan if diverges and generator.initial_seed() == 1 else 0.5

    for _ in range(2):  # the second time from the file
        found = searched(train, results=tmp_path / "r.jsonl")
        assert found.costs["1"] == {2: math.inf, 4: 0.0}
        assert found.errors["1"][4] == 0.0
    search = BasisSearch(small_net(), **ONE)
    assert search.plan(found, max_cost=1e9) == {"1": 4}

    with pytest.raises(RuntimeError, match=r"^The model as it is diverged .* seed 0"):
        searched(lambda model, generator: math.inf)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    search = BasisSearch(small_net(), **ONE)
    with pytest.raises(ValueError, match=r"^Method 'train' needs train="):
        search.sensitivities("train")
    with pytest.raises(ValueError, match=r"^Unknown method 'guess'; choose 'taylor' or 'train'\.$"):
        search.sensitivities("guess")
    for seeds in ((), (1, 1)):
        with pytest.raises(ValueError, match=r"give at least one, all different"):
            searched(seeds=seeds)
    with pytest.raises(TypeError, match=r"^train returned NoneType; return the quality"):
        searched(lambda model, generator: None)
    with pytest.raises(RuntimeError, match=r"^map_trials returned without 8 of the 9 trainings"):
        searched(map_trials=lambda f, trials: [f(next(iter(trials)))])

    file = tmp_path / "results.jsonl"
    searched(results=file)
    other = BasisSearch(nn.Sequential(nn.Identity(), *small_net()), (0.5,), ["2"])
    with pytest.raises(ValueError, match=r"holds results of another model"):
        other.sensitivities("train", train=train_briefly, results=file)
    lines = file.read_text().splitlines()
    assert len(json.loads(lines[1])) == 5
    for content in ("hello", "hello\n", "\n".join([*lines[:2], '["1", 2]', ""])):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"is not a file of search results"):
            searched(results=file)
        assert file.read_text() == content, "a file that is refused stays as it is"
