"""The README's tables come from stored results alone, and the same way every time."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from test_benchmark_results import family_result

from benchmarks import markdown
from benchmarks.case import OURS
from benchmarks.claims_table import REPRODUCTIONS, StudyTable
from benchmarks.families import cases_on, family_files, load_family
from benchmarks.gpu_table import GPU_TABLE, GpuRow, GpuTable
from benchmarks.headlines import Headline, HeadlineTable
from benchmarks.readme_tables import regenerate
from benchmarks.speed_plot import draw
from benchmarks.store_reproduction import store
from benchmarks.table import COLUMNS, Table

TABLE = Table("speed", "toy", ("case", "shape", "opponent", "speed-up", "machine"))
SPIRALS = REPRODUCTIONS[0]
README = "Before\n<!-- table: speed -->\nold\n<!-- end table -->\nAfter\n"


def _one(text: str, tables: Sequence[Table], results: Path) -> str:
    return regenerate({"README.md": text}, tables, results)["README.md"]


def test_regeneration_fills_the_marked_place_and_is_idempotent(tmp_path: Path) -> None:
    family_result().store(tmp_path)
    once = _one(README, [TABLE], tmp_path)
    assert once.splitlines() == [
        "Before",
        "<!-- table: speed -->",
        "Machine: Some CPU, 2 threads.",
        "",
        "| case | shape | opponent | speed-up |",
        "| --- | --- | --- | --- |",
        "| toy | 2 × [8, 4] | eager | 3.00× (2.50 to 3.00) |",
        "<!-- end table -->",
        "After",
    ]
    assert _one(once, [TABLE], tmp_path) == once


def test_every_machine_with_results_has_its_rows(tmp_path: Path) -> None:
    for machine in ("A", "B"):
        family_result(machine=machine).store(tmp_path)
    text = _one(README, [TABLE], tmp_path)
    assert [line.split(" | ")[-1] for line in text.splitlines()[4:6]] == ["A |", "B |"]


def test_missing_results_say_which_command_makes_them(tmp_path: Path) -> None:
    family_result("other").store(tmp_path)
    with pytest.raises(FileNotFoundError, match="run 'growkernels bench toy' first"):
        _one(README, [TABLE], tmp_path)


def test_headlines_are_geometric_means_over_cases(tmp_path: Path) -> None:
    family = family_result()
    (case,) = family.cases
    twice = replace(case, name="toy 2", variants=dict(case.variants))
    slower = case.variants["eager"]
    twice.variants["eager"] = replace(slower, seconds=[4 * time for time in slower.seconds])
    replace(family, cases=[case, twice]).store(tmp_path)
    both = Headline("sums", "two sizes", "toy", ("toy", "toy 2"), ("eager",))
    table = HeadlineTable("speed", (both,)).markdown(tmp_path)
    assert table.splitlines() == [
        "Machine: Some CPU, 2 threads.",
        "",
        "| what | shape | speed-up over |",
        "| --- | --- | --- |",
        "| sums | two sizes | **6.00×** eager |",
    ]

    lacking = Headline("sums", "two sizes", "toy", ("toy", "toy 3"), ("eager",))
    with pytest.raises(ValueError, match=r"needs 'eager' in the cases \['toy 3'\] of 'toy'"):
        HeadlineTable("speed", (lacking,)).markdown(tmp_path)
    with pytest.raises(FileNotFoundError, match="run 'growkernels bench other' first"):
        HeadlineTable("speed", (replace(both, family="other"),)).markdown(tmp_path)


def test_a_table_says_nothing_twice() -> None:
    rows = [["a", "1", "x", "CPU"], ["a", "1", "y", "CPU"], ["b", "1", "y", "CPU"]]
    heading = ["case", "size", "opponent", "machine"]
    assert markdown.table(heading, rows, ["machine"]).splitlines() == [
        "Machine: CPU.",
        "",
        "| case | size | opponent |",
        "| --- | --- | --- |",
        "| a | 1 | x |",
        "|  |  | y |",
        "| b | 1 | y |",
    ]
    assert markdown.table(heading[:1], [["a"], ["a"]]).splitlines()[2:] == ["| a |", "| a |"]


def test_the_picture_needs_every_headline(tmp_path: Path) -> None:
    family_result().store(tmp_path)
    headline = Headline("`sum`", "one", "toy", ("toy",), ("eager",))
    picture = tmp_path / "speed.png"
    draw([headline], tmp_path, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="needs 'compiled' in the cases"):
        draw([replace(headline, opponents=("compiled",))], tmp_path, tmp_path / "other.png")
    assert [path.name for path in tmp_path.glob("*.png")] == ["speed.png"]


def test_headlines_are_of_cpus_alone(tmp_path: Path) -> None:
    family_result().store(tmp_path)
    family_result(machine="Some GPU", device="cuda").store(tmp_path)
    table = HeadlineTable("speed", (Headline("sum", "one", "toy", ("toy",), ("eager",)),))
    assert "Some GPU" not in table.markdown(tmp_path)


def test_headlines_are_of_a_makers_cpu_that_was_measured_last(tmp_path: Path) -> None:
    for machine, time in (("Ours 1", "2026-02"), ("Ours 2", "2026-01"), ("Theirs 1", "2025-12")):
        result = family_result(machine=machine)
        result.environment["time"] = time
        result.store(tmp_path)
    headline = Headline("sum", "one", "toy", ("toy",), ("eager",))
    assert list(headline.speedups(tmp_path)) == ["Ours 1", "Theirs 1"]


def test_the_gpu_table_has_one_row_per_case_against_its_best_opponent(tmp_path: Path) -> None:
    family_result().store(tmp_path)
    table = GpuTable("gpu", (GpuRow("toy", "toy"), GpuRow("toy", "not measured yet")))
    assert table.markdown(tmp_path) == "No result from a GPU is stored yet."

    family = family_result(machine="Some GPU", device="cuda")
    (case,) = family.cases
    eager = case.variants["eager"]
    faster = replace(eager, seconds=[time / 2 for time in eager.seconds])
    variants = {"eager": eager, "compiled": faster, OURS: case.variants[OURS]}
    other = replace(case, name="of no interest")
    replace(family, cases=[other, replace(case, variants=variants)]).store(tmp_path)
    facts, _, *_, row = table.markdown(tmp_path).splitlines()
    assert facts.endswith("; machine: Some GPU.")
    assert row.startswith("| `toy` | toy | 2 × [8, 4] |")
    assert " | compiled | 1.50× (1.25 to 1.50) | " in row
    (row,) = GpuRow("toy", "toy", ("eager",)).cells(tmp_path)
    assert row[4:6] == ["eager", "3.00× (2.50 to 3.00)"]


def test_the_gpu_table_names_cases_and_opponents_that_exist() -> None:
    files = family_files()
    for row in GPU_TABLE.rows:
        declared = {case.name: case for case in cases_on("cuda", load_family(files[row.family]))}
        assert set(row.opponents) <= set(declared[row.case].opponents)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no marker", "has a place for the table 'speed'"),
        ("<!-- table: speed -->\n", "lacks its <!-- end table --> marker"),
        (README + README.replace("speed", "sped"), "'sped' that no benchmark family declares"),
    ],
)
def test_wrong_markers_are_named(tmp_path: Path, text: str, message: str) -> None:
    family_result().store(tmp_path)
    with pytest.raises(ValueError, match=message):
        _one(text, [TABLE], tmp_path)


def test_an_unclosed_table_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    family_result().store(tmp_path)
    other = Table("other", "toy", TABLE.columns)
    text = "<!-- table: other -->\nimportant words\n" + README
    with pytest.raises(ValueError, match="table 'other' lacks its <!-- end table --> marker"):
        _one(text, [TABLE, other], tmp_path)


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


def stored_reproduction(folder: Path, preset: str = "desk", commit: str | None = "abc") -> Path:
    effect = {"mean": -0.5, "low": -0.75, "high": 0.25, "count": 6}
    findings = [
        {"setting": "exp1", "verdict": "holds", "measured": "6 %", "effect": None},
        {"setting": "exp2", "verdict": "cannot be told", "measured": "long", "effect": effect},
        {"setting": "exp3", "verdict": None, "measured": "no test", "effect": None},
    ]
    claim = {"claim": "It helps.", "verdict": "holds", "ours": True, "findings": findings}
    environment = {"commit": commit, "cpu": "Some CPU", "gpu": None, "torch": "2"}
    summary = {
        "experiment": "sensli", "net": "fc", "preset": preset, "claims": [claim],
        "environment": environment, "registration": {"file": "c.toml", "commit": "def"},
    }  # fmt: skip
    (folder / "plots").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    for name in SPIRALS.pictures:
        Image.new("RGBA", (8, 8), "white").save(folder / "plots" / f"{name}.png")
    return folder


def test_a_stored_reproduction_shows_its_claims_and_pictures(tmp_path: Path) -> None:
    assert SPIRALS.markdown(tmp_path) == (
        "*The runs of this study are not finished; nothing is stored.*"
    )
    assert store(stored_reproduction(tmp_path / "run"), tmp_path) == tmp_path / "evidence/spirals"
    text = SPIRALS.markdown(tmp_path)
    assert "at commit `abc` on Some CPU with torch 2; claims registered in `c.toml`" in text
    assert (
        "| Ours: It helps. | **holds** | exp1: 6 %<br>exp2: −0.500 [−0.750, +0.250], 6 runs "
        "(cannot be told)<br>exp3: no test |"
    ) in text
    shown = re.findall(r"!\[.+\]\((.+)\)", text)
    assert len(shown) == len(SPIRALS.pictures)
    assert all((tmp_path / path).is_file() for path in shown)


def test_what_decides_nothing_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"summary.json is missing; finish the run with --resume"):
        store(tmp_path, tmp_path)
    quick = stored_reproduction(tmp_path / "quick", preset="quick")
    changed = stored_reproduction(tmp_path / "changed", commit="abc+")
    with pytest.raises(ValueError, match="a run of quick sensli; no document shows it"):
        store(quick, tmp_path)
    with pytest.raises(ValueError, match="from files that differ from their commit"):
        store(changed, tmp_path)
    assert not (tmp_path / "evidence").exists()


def test_a_study_shows_its_variants_and_what_was_measured(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    grown = {"runs": 2, "test_loss": "1.6 ± 0.1", "inserted_behind": [[0, 1], [0, 1], [2, 0]]}
    fixed = {"runs": 1, "test_loss": "1.8", "inserted_behind": [[]]}
    claim = {"claim": "It helps.", "verdict": "holds", "measured": "grown against fixed: -0.2"}
    summary = {"claims": [claim], "variants": {"grown": grown, "fixed": fixed}}
    (tmp_path / "study" / "summary.json").write_text(json.dumps(summary))
    rows = StudyTable("study", "study").markdown(tmp_path).splitlines()
    assert rows[2:4] == [
        "| grown | 2 | 1.6 ± 0.1 | 0, 1; 2, 0 |",
        "| fixed | 1 | 1.8 | not grown |",
    ]
    assert rows[-1] == "| It helps. | **holds** | grown against fixed: -0.2 |"


def test_a_study_without_a_stored_summary(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"study.summary\.json is missing; run the study"):
        StudyTable("study", "study").markdown(tmp_path)
