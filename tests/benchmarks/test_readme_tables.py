"""The README's tables come from stored results alone, and the same way every time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_benchmark_results import family_result

from benchmarks.case import OURS
from benchmarks.claims_table import ClaimsTable
from benchmarks.readme_tables import regenerate
from benchmarks.table import COLUMNS, MeansTable, Table

TABLE = Table("speed", "toy", ("case", "shape", "opponent", "speed-up", "machine"))
README = "Before\n<!-- table: speed -->\nold\n<!-- end table -->\nAfter\n"


def test_regeneration_fills_the_marked_place_and_is_idempotent(tmp_path: Path) -> None:
    family_result().store(tmp_path)
    once = regenerate(README, [TABLE], tmp_path)
    assert once.splitlines() == [
        "Before",
        "<!-- table: speed -->",
        "| case | shape | opponent | speed-up | machine |",
        "| --- | --- | --- | --- | --- |",
        "| toy | 2 × [8, 4] | eager | 3.00× (2.50 to 3.00) | Some CPU, 2 threads |",
        "<!-- end table -->",
        "After",
    ]
    assert regenerate(once, [TABLE], tmp_path) == once


def test_every_machine_with_results_has_its_rows(tmp_path: Path) -> None:
    for machine in ("A", "B"):
        family_result(machine=machine).store(tmp_path)
    text = regenerate(README, [TABLE], tmp_path)
    assert [line.split(" | ")[-1] for line in text.splitlines()[4:6]] == ["A |", "B |"]


def test_missing_results_say_which_command_makes_them(tmp_path: Path) -> None:
    family_result("other").store(tmp_path)
    with pytest.raises(FileNotFoundError, match="run 'growkernels bench toy' first"):
        regenerate(README, [TABLE], tmp_path)


def test_means_over_a_group_of_cases(tmp_path: Path) -> None:
    result = family_result()
    (case,) = result.cases
    opponent = {name: replace(v, seconds=[4 * s for s in v.seconds]) if name != OURS else v
                for name, v in case.variants.items()}  # fmt: skip
    slower = replace(case, name="toy 2", variants=opponent)
    replace(result, cases=[case, slower]).store(tmp_path)
    means = MeansTable("means", "toy", {"both": ("toy", "toy 2")})
    text = regenerate(README.replace("speed", "means"), [means], tmp_path)
    # The geometric mean of 3 and of 4 x 3.
    assert text.splitlines()[4] == "| both | eager | 6.00× | Some CPU, 2 threads |"
    lacking = MeansTable("means", "toy", {"both": ("toy", "toy 3")})
    with pytest.raises(ValueError, match="lack toy 3; run 'growkernels bench toy' again"):
        regenerate(README.replace("speed", "means"), [lacking], tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker", "no place for the table 'speed'"),
        ("<!-- table: speed -->\n", "lacks its <!-- end table --> marker"),
        (README + README.replace("speed", "sped"), "'sped' that no benchmark family declares"),
    ],
)
def test_wrong_markers_are_named(tmp_path: Path, text: str, message: str) -> None:
    family_result().store(tmp_path)
    with pytest.raises(ValueError, match=message):
        regenerate(text, [TABLE], tmp_path)


def test_an_unclosed_table_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    family_result().store(tmp_path)
    other = Table("other", "toy", TABLE.columns)
    text = "<!-- table: other -->\nimportant words\n" + README
    with pytest.raises(ValueError, match="table 'other' lacks its <!-- end table --> marker"):
        regenerate(text, [TABLE, other], tmp_path)


def test_a_speedup_needs_opponent_shape_and_machine() -> None:
    with pytest.raises(ValueError, match="speed-up without shape and machine"):
        Table("speed", "toy", ("case", "opponent", "speed-up"))
    with pytest.raises(ValueError, match="no such column 'speed'"):
        Table("speed", "toy", ("speed",))


def test_every_column_can_be_filled() -> None:
    result = family_result()
    cells = Table("all", "toy", tuple(COLUMNS)).cells([result])
    assert len(cells) == 1
    assert all(cells[0])


def test_claims_table_groups_settings_by_verdict(tmp_path: Path) -> None:
    finding = {"measured": "1 ± 0"}
    claim = {
        "claim": "It helps.",
        "verdict": "cannot be told",
        "findings": [
            {"setting": "exp1", "verdict": "holds", **finding},
            {"setting": "exp2", "verdict": None, **finding},
            {"setting": "exp3", "verdict": "holds", **finding},
        ],
    }
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "summary.json").write_text(json.dumps({"claims": [claim]}))
    table = ClaimsTable("claims paper", "paper").markdown(tmp_path)
    row = "| It helps. | **cannot be told** | holds: exp1, exp3; no test: exp2 |"
    assert table.splitlines()[-1] == row


def test_claims_table_without_a_stored_summary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="growkernels reproduce paper"):
        ClaimsTable("claims paper", "paper").markdown(tmp_path)
