"""Ratios, rates and spreads of hand-made measurements, and the stored file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.case import OURS
from benchmarks.results import CaseResult, FamilyResult, Spread, VariantResult, load, stored
from benchmarks.store import store_suite


def case_result() -> CaseResult:
    # The machine halves its speed after round 1: medians mislead, paired ratios do not.
    return CaseResult(
        name="toy",
        shape="2 × [8, 4]",
        dtype="float32",
        layout="contiguous",
        direction="norms",
        flops=12e9,
        bytes=3e9,
        ceiling_kind="gemm",
        ceiling=[20e9, 10e9, 10e9],
        baseline="eager",
        variants={
            "eager": VariantResult([3.0, 6.0, 6.0], 1, 2 * 2**20),
            OURS: VariantResult([1.0, 2.0, 3.0], 7, None),
        },
    )


def family_result(
    family: str = "toy", machine: str = "Some CPU, 2 threads", device: str = "cpu"
) -> FamilyResult:
    environment = {"machine": machine, "device": device, "torch": "2.13.0"}
    return FamilyResult(family, environment, [case_result()])


def test_spread_is_the_median_with_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ratios_are_paired_within_rounds() -> None:
    case = case_result()
    assert case.speedup("eager") == Spread(3.0, 2.5, 3.0)  # of 3, 3, 2
    added = case.added_share(OURS)
    assert added is not None
    assert added.median == pytest.approx(1 / 3 - 1)
    assert case.added_share("eager") is None


def test_rates_are_compared_with_the_ceiling_of_their_round() -> None:
    case = case_result()
    assert case.rate(OURS).median == 6e9
    assert case.share_of_ceiling(OURS) == Spread(0.6, 0.5, 0.6)  # 12/20, 6/10, 4/10
    memory_bound = replace(case, ceiling_kind="copy")
    assert memory_bound.rate(OURS).median == 1.5e9
    assert replace(case, ceiling_kind=None, ceiling=[]).share_of_ceiling(OURS) is None


def test_a_stored_family_reads_back_the_same(tmp_path: Path) -> None:
    result = family_result()
    path = result.store(tmp_path)
    assert path.name == "toy-some-cpu-2-threads.json"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert load(path) == result
    assert load(path).cases[0].timing == "wall clock"
    summary = json.loads(path.read_text())["cases"][0]["summary"]
    assert summary["eager"]["speedup_of_ours"]["median"] == 3.0
    assert summary["eager"]["peak_mib"] == 2.0
    assert summary[OURS]["peak_mib"] is None


def test_a_second_run_replaces_the_family_of_that_machine_alone(tmp_path: Path) -> None:
    for family, machine in (("toy", "A"), ("toy", "B"), ("other", "A"), ("toy", "A")):
        family_result(family, machine).store(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    assert [result.environment["machine"] for result in stored("toy", tmp_path)] == ["A", "B"]


def test_results_can_be_asked_for_by_device(tmp_path: Path) -> None:
    family_result(machine="A").store(tmp_path)
    family_result(machine="G", device="cuda").store(tmp_path)
    for device, machines in (("cpu", ["A"]), ("cuda", ["G"]), (None, ["A", "G"])):
        found = [result.environment["machine"] for result in stored("toy", tmp_path, device)]
        assert found == machines


@pytest.mark.parametrize("damage", ["schema", "rounds", "field", "text"])
def test_a_damaged_file_is_named_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = family_result().store(tmp_path)
    content = json.loads(path.read_text())
    if damage == "schema":
        content["schema"] = 99
    elif damage == "rounds":
        content["cases"][0]["variants"]["eager"]["seconds"].pop()
    elif damage == "field":
        del content["cases"][0]["shape"]
    path.write_text("{" if damage == "text" else json.dumps(content))
    with pytest.raises(ValueError, match=rf"{path.name} is not a readable benchmark result"):
        load(path)


def suite_of(folder: Path, *families: FamilyResult) -> Path:
    """A file as `make gpu-suite` writes it."""
    contents = {f.family: json.loads(f.store(folder / "scratch").read_text()) for f in families}
    path = folder / "results.json"
    path.write_text(json.dumps({"steps": [], "benchmarks": contents}))
    return path


def test_a_suites_families_are_stored_with_the_others(tmp_path: Path) -> None:
    toy, other = (family_result(name, "G", "cuda") for name in ("toy", "other"))
    lines = store_suite(suite_of(tmp_path, toy, other), tmp_path / "results")
    assert [line.split(" stored in ")[0] for line in lines] == ["toy: 1 cases", "other: 1 cases"]
    assert stored("toy", tmp_path / "results", "cuda") == [toy]


def test_fewer_cases_do_not_replace_more(tmp_path: Path) -> None:
    toy = family_result(machine="G", device="cuda")
    whole = replace(toy, cases=[*toy.cases, replace(toy.cases[0], name="second")])
    whole.store(tmp_path / "results")
    (line,) = store_suite(suite_of(tmp_path, toy), tmp_path / "results")
    assert line == "toy: left out, 1 cases where 2 are stored"
    assert stored("toy", tmp_path / "results") == [whole]


@pytest.mark.parametrize("text", ["{}", '{"benchmarks": {"toy": {"schema": 1}}}', "["])
def test_a_file_that_is_no_suites_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not the result of a GPU suite"):
        store_suite(path, tmp_path / "results")
    with pytest.raises(ValueError, match="holds no benchmark results"):
        store_suite(suite_of(tmp_path), tmp_path / "results")
