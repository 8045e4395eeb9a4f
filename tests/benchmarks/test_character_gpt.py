"""The study of a character GPT, at a size of seconds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import character_gpt as study
from benchmarks.character_gpt import GROWN, VARIANTS, Setting, Text, Training

TINY = Setting(
    width=16, heads=2, blocks=2, growth=(0.3, 0.5), context=8, batch=2, steps=24, recorded=2,
    test_windows=8, runs=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def text() -> Text:
    return Text.of_standard_library()


@pytest.fixture(scope="module")
def finished(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study.study(tmp_path_factory.mktemp("gpt"), TINY, text)


def _lines(summary: Path) -> list[dict[str, object]]:
    lines = summary.with_name("trainings.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_text_is_source_code_without_what_is_tested(text: Text) -> None:
    def characters(numbers: torch.Tensor) -> str:
        return "".join(study.ALPHABET[number] for number in numbers.tolist())

    assert "def __init__(self" in characters(text.training[:50_000])
    assert text.about["characters"] == len(text.training) + len(text.test) > 1_000_000
    assert len(text.test) < len(text.training) / 4
    assert Text.of_standard_library().about == text.about


def test_all_variants_have_equal_operations_and_one_size(finished: Path) -> None:
    lines = _lines(finished)
    assert [(line["variant"], line["run"]) for line in lines] == [
        (variant, run) for run in range(2) for variant in VARIANTS
    ]
    assert len({line["parameters"] for line in lines}) == 1
    last_step = 3 * TINY.forward_flops(4)
    for line in lines:
        assert TINY.all_flops <= line["flops"] < TINY.all_flops + last_step
        grown = line["variant"] in GROWN
        assert len(line["insertions"]) == (2 if grown else 0)
    by_variant = {line["variant"]: line for line in lines[:5]}
    assert [i["behind"] for i in by_variant["first"]["insertions"]] == [0, 0]
    assert [i["behind"] for i in by_variant["last"]["insertions"]] == [1, 2]
    assert by_variant["merit"]["steps"] < by_variant["random"]["steps"]  # its merits are counted
    for insertion in by_variant["merit"]["insertions"]:
        merits = [float(merit) for merit in insertion["merits"]]
        assert merits[insertion["behind"]] == max(merits)


def test_operations_are_what_torch_counts() -> None:
    training = Training.new(TINY, 0, 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training.model(torch.zeros(2, 8, dtype=torch.long))
    assert counter.get_total_flops() == TINY.forward_flops(3)


def test_a_study_goes_on_where_it_ended(finished: Path, text: Text, tmp_path: Path) -> None:
    lines = finished.with_name("trainings.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "trainings.jsonl").write_text("".join(lines[:3]))
    again = study.study(tmp_path, TINY, text)
    assert again == tmp_path / "summary.json"
    for old, new in zip(_lines(finished), _lines(again), strict=True):
        assert {**old, "seconds": 0} == {**new, "seconds": 0}
    with pytest.raises(ValueError, match="holds a study of other sizes"):
        study.study(tmp_path, replace(TINY, width=32), text)


def test_few_runs_decide_nothing_and_clear_ones_do(finished: Path, text: Text) -> None:
    summary = json.loads(finished.read_text())
    assert {claim["verdict"] for claim in summary["claims"]} == {"not enough runs"}
    records = [
        {**_lines(finished)[0], "variant": variant, "run": run, "test_loss": loss + 0.01 * run,
         "training_loss": loss}
        for run in range(6)
        for variant, loss in (("merit", 2.0), ("first", 2.5), ("last", 2.2 + 0.1 * (run % 2)),
                              ("random", 1.5), ("scratch", 2.0 + (-1) ** run))
    ]  # fmt: skip
    claims = study.summarise(TINY, text, records, {})["claims"]
    verdicts = [claim["verdict"] for claim in claims]
    assert verdicts[:4] == ["does not hold", "holds", "holds", "cannot be told"]
