"""The graph of a study: stretches, paths, and the runner that trains and resumes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pool_work import in_this_process

from growkernels.experiments import runner
from growkernels.experiments.run_folder import RunFolderError, StateStore
from growkernels.experiments.study import (
    Content,
    Fork,
    Forks,
    Result,
    Stretch,
    along,
    finished,
    stretches_of,
)

VARIANTS: dict[str, Forks] = {
    "small": (Fork(0, "a"),),
    "early": (Fork(0, "a"), Fork(2, "x")),
    "late": (Fork(0, "a"), Fork(5, "x")),
    "twice": (Fork(0, "a"), Fork(2, "x"), Fork(5, "y")),
    "other": (Fork(0, "b"),),
}


def test_ways_are_cut_where_they_part() -> None:
    stretches, paths = stretches_of(VARIANTS, 8, "run0", about="it")
    spans = {s.key: (s.first, s.last, s.parent) for s in stretches}
    assert spans == {
        "run0-a-to2": (0, 2, None),
        "run0-a-to5": (2, 5, "run0-a-to2"),
        "run0-a-to8": (5, 8, "run0-a-to5"),
        "run0-b-to8": (0, 8, None),
        "run0-a+x@2-to5": (2, 5, "run0-a-to2"),
        "run0-a+x@2-to8": (5, 8, "run0-a+x@2-to5"),
        "run0-a+x@5-to8": (5, 8, "run0-a-to5"),
        "run0-a+x@2+y@5-to8": (5, 8, "run0-a+x@2-to5"),
    }
    assert paths["small"] == ["run0-a-to2", "run0-a-to5", "run0-a-to8"]
    assert paths["twice"] == ["run0-a-to2", "run0-a+x@2-to5", "run0-a+x@2+y@5-to8"]
    assert {s.key for s in stretches if s.forked} == {
        "run0-a-to2", "run0-b-to8", "run0-a+x@2-to5", "run0-a+x@5-to8", "run0-a+x@2+y@5-to8"
    }  # fmt: skip
    keys = [s.key for s in stretches]
    assert all(s.parent is None or keys.index(s.parent) < keys.index(s.key) for s in stretches)


@dataclass
class Sum:
    """Adds up its steps; a fork counts for a hundred."""

    total: int
    measured: dict[str, Any]

    def advance(self, step: int) -> None:
        self.total += step
        self.measured["steps"]["total"].append(self.total)

    def state(self) -> dict[str, int]:
        return {"total": self.total}


@dataclass(frozen=True)
class Sums(Content):
    device: str = "cpu"
    name: ClassVar[str] = "sums"
    claims: ClassVar[Path] = Path()
    page: ClassVar[str] = ""

    def config(self) -> dict[str, Any]:
        return {}

    def stretches(self) -> list[Stretch]:
        return stretches_of(VARIANTS, 8, "run0")[0]

    def begin(self, stretch: Stretch, parent: Result | None) -> Sum:
        total = 0 if parent is None else parent.state["total"]
        return Sum(total + 100 * stretch.forked, {"steps": {"total": []}})

    def resume(self, stretch: Stretch, stored: Result) -> Sum:
        return Sum(stored.state["total"], stored.measured)

    def records(self, results: Mapping[str, Result]) -> list[dict[str, Any]]:
        return []

    def conclude(self, results: Any, folder: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateStore:
    monkeypatch.setattr(runner, "run_parts", in_this_process)
    return StateStore(tmp_path)


def trained(states: StateStore) -> dict[str, Result]:
    results: dict[str, Result] = {}
    runner.train(Sums(), states, 0.0, lambda stretch, step: None, results)
    return results


def test_children_go_on_where_their_parents_end(states: StateStore) -> None:
    results = trained(states)
    paths = stretches_of(VARIANTS, 8, "run0")[1]
    assert finished(results, paths["twice"])
    assert not finished(results, [])
    assert along(results, paths["small"])["total"] == [
        100 + t for t in (0, 1, 3, 6, 10, 15, 21, 28)
    ]
    assert along(results, paths["twice"])["total"][-1] == 300 + 28
    leaf, inner = (states.load(f"run0-{key}") for key in ("a-to8", "a-to2"))
    assert leaf["state"] is None  # a finished training keeps weights for its children alone
    assert inner["state"] == {"total": 101}


def test_what_is_there_is_not_trained_again(
    states: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(states)
    states.file("run0-a-to8").unlink()
    half = {"step": 4, "measured": {"steps": {"total": [203, 206]}}, "state": {"total": 206}}
    states.save("run0-a+x@2-to5", half)
    states.file("run0-a+x@2-to8").unlink()
    begun = []
    monkeypatch.setattr(Sums, "begin", lambda *a, b=Sums.begin: begun.append(a[1].key) or b(*a))
    assert trained(states) == whole
    assert sorted(begun) == ["run0-a+x@2-to8", "run0-a-to8"]


@pytest.mark.parametrize(
    "other",
    [
        {"step": 2, "measured": {}, "state": {"weights": torch.ones(2)}},
        {"step": 2, "measured": {}, "state": None},
        {"step": 9, "measured": {}, "state": None},
        {"step": "three", "measured": {}, "state": None},
        {"epoch": 3},
        [1, 2],
        torch.ones(3),
    ],
)
@pytest.mark.parametrize("key", ["run0-a-to5", "run0-a-to2"])
def test_a_valid_checkpoint_with_other_contents_is_one_sentence(
    states: StateStore, other: Any, key: str
) -> None:
    trained(states)
    for file in states.path.glob("*.pt"):
        file.unlink()
    states.save(key, other)
    with pytest.raises(RunFolderError, match="delete it and use --resume") as caught:
        trained(states)
    assert f"{key}.pt does not hold the state" in str(caught.value)
    assert "\n" not in str(caught.value)
