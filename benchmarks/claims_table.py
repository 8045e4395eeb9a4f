"""Tables of claims, from the stored summaries of reproductions and studies."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import markdown

DOCUMENTS = Path(__file__).resolve().parent.parent / "docs"


@dataclass(frozen=True)
class Reproduction:
    """What a paper's study came to: its claims, and ``pictures``, file names and their texts.

    It is stored in the folder of its name below ``docs/evidence``; ``experiment`` and ``net`` say
    whose run belongs there. The document with the table lies in ``docs``.
    """

    name: str
    experiment: str
    pictures: Mapping[str, str]
    net: str | None = None

    @property
    def folder(self) -> str:
        return f"evidence/{self.name}"

    def markdown(self, folder: Path = DOCUMENTS) -> str:
        """Where it ran, the claims and the pictures; a sentence where nothing is stored."""
        path = folder / self.folder / "summary.json"
        if not path.is_file():
            return "*The runs of this study are not finished; nothing is stored.*"
        summary = json.loads(path.read_text())
        environment, registration = summary["environment"], summary["registration"]
        where = (
            f"Ran with `--preset {summary['preset']}` at commit `{environment['commit']}` on "
            f"{environment['gpu'] or environment['cpu']} with torch {environment['torch']}; claims "
            f"registered in `{registration['file']}`, commit `{registration['commit']}`."
        )
        for part in summary.get("earlier", ()):
            of = part["environment"]
            where += (
                f" Of the {summary['runs']} runs the first {part['runs']} were finished at commit "
                f"`{of['commit']}` on {of['gpu'] or of['cpu']} with torch {of['torch']}."
            )
        rows = [
            [
                f"{'Ours: ' if claim['ours'] else ''}{claim['claim']}",
                f"**{claim['verdict']}**",
                "<br>".join(_finding(f, claim["verdict"]) for f in claim["findings"]),
            ]
            for claim in summary["claims"]
        ]
        table = markdown.table(("claim", "verdict", "measured, with its 95 % interval"), rows)
        pictures = (
            f"![{text}]({self.folder}/{name}.png)\n\n*{text}*"
            for name, text in self.pictures.items()
        )
        return "\n\n".join((where, table, *pictures))


def _finding(finding: Mapping[str, Any], verdict: str) -> str:
    effect = finding.get("effect")
    if effect is None or effect["low"] is None:
        text = f"{finding['setting']}: {finding['measured']}"
    else:
        mean, low, high = (_signed(effect[key]) for key in ("mean", "low", "high"))
        text = f"{finding['setting']}: {mean} [{low}, {high}], {effect['count']} runs"
    own = finding["verdict"]
    return text if own in (verdict, None) else f"{text} ({own})"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


@dataclass(frozen=True)
class StudyTable:
    """What the variants of the study in a folder below `docs` came to, and its claims with it."""

    name: str
    folder: str

    def markdown(self, folder: Path = DOCUMENTS) -> str:
        """Both tables in Markdown; FileNotFoundError where no summary is stored."""
        path = folder / self.folder / "summary.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run the study and copy its summary there")
        summary = json.loads(path.read_text())
        return "\n\n".join(
            (
                markdown.table(
                    ("variant", "runs", "test loss", "grown behind blocks"),
                    [
                        [name, str(of["runs"]), of["test_loss"], _places(of["inserted_behind"])]
                        for name, of in summary["variants"].items()
                    ],
                ),
                markdown.table(
                    ("claim", "verdict", "measured"),
                    [[c["claim"], f"**{c['verdict']}**", c["measured"]] for c in summary["claims"]],
                ),
            )
        )


def _places(runs: Sequence[Sequence[int]]) -> str:
    """Where the runs grew, every sequence of places once."""
    different = dict.fromkeys(", ".join(map(str, places)) for places in runs if places)
    return "; ".join(different) or "not grown"


REPRODUCTIONS = (
    Reproduction(
        "spirals",
        "sensli",
        {
            "loss_one_insertion": "One insertion: mean training loss over all initialisations.",
            "loss_three_insertions": "Three spaced insertions against the final network from "
            "scratch.",
            "insertion_times": "When to insert: final training loss against the epoch of the "
            "insertion.",
        },
        net="fc",
    ),
    Reproduction(
        "cnn",
        "sensli",
        {
            "training_loss": "Training loss of the small VGG and its variants.",
            "insertion_times": "When to insert a convolution.",
        },
        net="cnn",
    ),
    Reproduction(
        "basis",
        "basis",
        {
            "time_and_accuracy": "What basis convolutions save and cost.",
            "accuracy_by_time": "Test accuracy against the wall time of the trainings.",
        },
    ),
    Reproduction(
        "scaling",
        "scaling",
        {
            "accuracy": "Test accuracy of the grown and the fixed networks.",
            "accuracy_by_parameters": "Final accuracy against the number of parameters.",
        },
    ),
)

# One for every study; their markers stand in docs/evidence.md.
CLAIMS: tuple[Reproduction | StudyTable, ...] = (
    *REPRODUCTIONS,
    StudyTable("character GPT", "character_gpt"),
)
